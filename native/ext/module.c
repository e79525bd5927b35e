/*
 * vfiopy._native: the parts of vfiopy that have to be C. This file only gathers them.
 *
 * The module keeps its types in static variables: one interpreter per process (single-phase initialisation says so to
 * CPython). It does nothing when imported but make the types.
 */
#include "ext/module.h"

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "vfiopy._native",
    .m_doc = "Native parts of vfiopy. Use vfiopy.mmio and vfiopy.iova, which explain them.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit__native(void)
{
    PyObject *module = PyModule_Create(&definition);

    if (!module)
        return NULL;
#ifdef Py_GIL_DISABLED
    PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    if (vfiopy_region_type_init(module) < 0 || vfiopy_iova_type_init(module) < 0 ||
        vfiopy_dma_types_init(module) < 0 || vfiopy_event_type_init(module) < 0 ||
        vfiopy_wire_type_init(module) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
