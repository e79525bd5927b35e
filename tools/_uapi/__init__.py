"""The generator of vfiopy's kernel declarations: what ``tools/uapi`` runs."""
