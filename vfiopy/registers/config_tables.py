"""Names of registers and fields of configuration space, as PCI Express Base 6.0, chapter 7, has them.

A row is name, offset from the start of its capability, bytes, and fields: ``name:high-low``, one bit where there is
one number, ``~`` before what a written 1 clears, ``=A,B,C`` the words for 0, 1, 2 (``_`` is a space).
"""

from __future__ import annotations

from typing import TypeAlias

__all__ = ["BRIDGE", "CAPABILITIES", "EXTENDED", "FUNCTION", "Row"]

Row: TypeAlias = tuple[str, int, int, str]

_SPEEDS = "=reserved,2.5_GT/s,5_GT/s,8_GT/s,16_GT/s,32_GT/s,64_GT/s"
_BYTES = "=128_bytes,256_bytes,512_bytes,1024_bytes,2048_bytes,4096_bytes"
_COUNTS = "=1,2,4,8,16,32"

_COMMON: list[Row] = [
    ("vendor", 0x00, 2, ""),
    ("device", 0x02, 2, ""),
    (
        "command",
        0x04,
        2,
        (
            "io:0 memory:1 bus_master:2 special_cycles:3 write_invalidate:4 vga_snoop:5 parity:6 serr:8 "
            "fast_back_to_back:9 intx_disable:10"
        ),
    ),
    (
        "status",
        0x06,
        2,
        (
            "immediate_readiness:0 interrupt:3 capabilities:4 mhz_66:5 fast_back_to_back:7 ~master_parity_error:8 "
            "devsel:10-9 ~signaled_target_abort:11 ~received_target_abort:12 ~received_master_abort:13 "
            "~signaled_system_error:14 ~parity_error:15"
        ),
    ),
    ("revision", 0x08, 1, ""),
    ("programming_interface", 0x09, 1, ""),
    ("subclass", 0x0A, 1, ""),
    ("base_class", 0x0B, 1, ""),
    ("cache_line", 0x0C, 1, ""),
    ("latency", 0x0D, 1, ""),
    ("header_type", 0x0E, 1, "layout:6-0=function,bridge,cardbus_bridge multifunction:7"),
    ("bist", 0x0F, 1, "code:3-0 start:6 capable:7"),
    ("capabilities_pointer", 0x34, 1, ""),
    ("interrupt_line", 0x3C, 1, ""),
    ("interrupt_pin", 0x3D, 1, "pin:7-0=none,INTA,INTB,INTC,INTD"),
]

FUNCTION: list[Row] = [
    *_COMMON,
    *((f"bar{index}", 0x10 + 4 * index, 4, "") for index in range(6)),
    ("cardbus_cis", 0x28, 4, ""),
    ("subsystem_vendor", 0x2C, 2, ""),
    ("subsystem_device", 0x2E, 2, ""),
    ("rom", 0x30, 4, "enable:0 address:31-11"),
    ("min_grant", 0x3E, 1, ""),
    ("max_latency", 0x3F, 1, ""),
]

BRIDGE: list[Row] = [
    *_COMMON,
    ("bar0", 0x10, 4, ""),
    ("bar1", 0x14, 4, ""),
    ("primary_bus", 0x18, 1, ""),
    ("secondary_bus", 0x19, 1, ""),
    ("subordinate_bus", 0x1A, 1, ""),
    ("secondary_latency", 0x1B, 1, ""),
    ("io_base", 0x1C, 1, ""),
    ("io_limit", 0x1D, 1, ""),
    ("secondary_status", 0x1E, 2, ""),
    ("memory_base", 0x20, 2, ""),
    ("memory_limit", 0x22, 2, ""),
    ("prefetchable_base", 0x24, 2, ""),
    ("prefetchable_limit", 0x26, 2, ""),
    ("prefetchable_base_upper", 0x28, 4, ""),
    ("prefetchable_limit_upper", 0x2C, 4, ""),
    ("io_base_upper", 0x30, 2, ""),
    ("io_limit_upper", 0x32, 2, ""),
    ("rom", 0x38, 4, "enable:0 address:31-11"),
    (
        "bridge_control",
        0x3E,
        2,
        "parity:0 serr:1 isa:2 vga:3 vga_16bit:4 master_abort:5 secondary_reset:6 fast_back_to_back:7",
    ),
]

_UNCORRECTABLE = (
    "{0}data_link_protocol:4 {0}surprise_down:5 {0}poisoned_tlp:12 {0}flow_control_protocol:13 "
    "{0}completion_timeout:14 {0}completer_abort:15 {0}unexpected_completion:16 {0}receiver_overflow:17 "
    "{0}malformed_tlp:18 {0}ecrc:19 {0}unsupported_request:20 {0}acs_violation:21 {0}internal:22 "
    "{0}mc_blocked_tlp:23 {0}atomic_egress_blocked:24 {0}tlp_prefix_blocked:25 {0}poisoned_egress_blocked:26 "
    "{0}dmwr_egress_blocked:27 {0}ide_check:28 {0}misrouted_ide:29 {0}pcrc_check:30 {0}translation_egress_blocked:31"
)
_CORRECTABLE = (
    "{0}receiver:0 {0}bad_tlp:6 {0}bad_dllp:7 {0}replay_number_rollover:8 {0}replay_timer_timeout:12 "
    "{0}advisory_non_fatal:13 {0}internal:14 {0}header_log_overflow:15"
)

# id → (name of the group, registers); MSI's differ from one to the next and are made in config_space.py
CAPABILITIES: dict[int, tuple[str, list[Row]]] = {
    0x01: (
        "pm",
        [
            (
                "capabilities",
                2,
                2,
                "version:2-0 d1:9 d2:10 pme_d0:11 pme_d1:12 pme_d2:13 pme_d3hot:14 pme_d3cold:15",
            ),
            ("control", 4, 2, "power_state:1-0=D0,D1,D2,D3hot no_soft_reset:3 pme_enable:8 ~pme_status:15"),
        ],
    ),
    0x03: ("vpd", [("address", 2, 2, "address:14-0 flag:15"), ("data", 4, 4, "")]),
    0x05: (
        "msi",
        [
            (
                "control",
                2,
                2,
                f"enable:0 vectors:3-1{_COUNTS} vectors_enabled:6-4{_COUNTS} address_64bit:7 maskable:8",
            ),
            ("address", 4, 4, ""),
        ],
    ),
    0x09: ("vendor_specific", [("length", 2, 1, "")]),
    0x0D: ("subsystem", [("vendor", 4, 2, ""), ("device", 6, 2, "")]),
    0x10: (
        "express",
        [
            ("capabilities", 0x02, 2, "version:3-0 type:7-4 slot:8 interrupt_message:13-9"),
            (
                "device_capabilities",
                0x04,
                4,
                (
                    f"max_payload:2-0{_BYTES} phantom_functions:4-3 extended_tags:5 l0s_latency:8-6 l1_latency:11-9 "
                    "role_based_errors:15 flr:28"
                ),
            ),
            (
                "device_control",
                0x08,
                2,
                (
                    "correctable_errors:0 nonfatal_errors:1 fatal_errors:2 unsupported_requests:3 relaxed_ordering:4 "
                    f"max_payload:7-5{_BYTES} extended_tags:8 phantom_functions:9 aux_power:10 no_snoop:11 "
                    f"max_read_request:14-12{_BYTES} flr:15"
                ),
            ),
            (
                "device_status",
                0x0A,
                2,
                (
                    "~correctable_error:0 ~nonfatal_error:1 ~fatal_error:2 ~unsupported_request:3 aux_power:4 "
                    "transactions_pending:5"
                ),
            ),
            (
                "link_capabilities",
                0x0C,
                4,
                (
                    f"max_speed:3-0{_SPEEDS} max_width:9-4 aspm:11-10=none,L0s,L1,L0s_and_L1 l0s_latency:14-12 "
                    "l1_latency:17-15 clock_pm:18 port:31-24"
                ),
            ),
            (
                "link_control",
                0x10,
                2,
                (
                    "aspm:1-0=off,L0s,L1,L0s_and_L1 read_completion_boundary:3=64_bytes,128_bytes disable:4 retrain:5 "
                    "common_clock:6 extended_sync:7 clock_pm:8"
                ),
            ),
            (
                "link_status",
                0x12,
                2,
                (
                    f"speed:3-0{_SPEEDS} width:9-4 training:11 slot_clock:12 active:13 ~bandwidth_management:14 "
                    "~autonomous_bandwidth:15"
                ),
            ),
            ("device_capabilities2", 0x24, 4, ""),
            ("device_control2", 0x28, 2, "completion_timeout:3-0 completion_timeout_disable:4 ari_forwarding:5 ltr:10"),
            ("link_capabilities2", 0x2C, 4, ""),
            ("link_control2", 0x30, 2, f"target_speed:3-0{_SPEEDS} enter_compliance:4"),
            ("link_status2", 0x32, 2, ""),
        ],
    ),
    0x11: (
        "msix",
        [
            ("control", 2, 2, "table_size_minus_1:10-0 function_mask:14 enable:15"),
            ("table", 4, 4, "bar:2-0 offset_by_8:31-3"),
            ("pba", 8, 4, "bar:2-0 offset_by_8:31-3"),
        ],
    ),
    0x13: (
        "af",
        [
            ("length", 2, 1, ""),
            ("capabilities", 3, 1, "transactions_pending:0 flr:1"),
            ("control", 4, 1, "flr:0"),
            ("status", 5, 1, "transactions_pending:0"),
        ],
    ),
}

EXTENDED: dict[int, tuple[str, list[Row]]] = {
    0x01: (
        "aer",
        [
            ("uncorrectable_status", 0x04, 4, _UNCORRECTABLE.format("~")),
            ("uncorrectable_mask", 0x08, 4, _UNCORRECTABLE.format("")),
            ("uncorrectable_severity", 0x0C, 4, _UNCORRECTABLE.format("")),
            ("correctable_status", 0x10, 4, _CORRECTABLE.format("~")),
            ("correctable_mask", 0x14, 4, _CORRECTABLE.format("")),
            ("control", 0x18, 4, "first_error:4-0 ecrc_generation:6 ecrc_check:8"),
            *((f"header_log{index}", 0x1C + 4 * index, 4, "") for index in range(4)),
        ],
    ),
    0x03: ("serial_number", [("low", 4, 4, ""), ("high", 8, 4, "")]),
    0x0B: ("vendor_specific_extended", [("header", 4, 4, "id:15-0 revision:19-16 length:31-20")]),
    0x0D: (
        "acs",
        [
            (
                name,
                offset,
                2,
                (
                    "source_validation:0 translation_blocking:1 p2p_request_redirect:2 p2p_completion_redirect:3 "
                    "upstream_forwarding:4 p2p_egress_control:5 direct_translated_p2p:6"
                ),
            )
            for name, offset in (("capabilities", 4), ("control", 6))
        ],
    ),
    0x0E: ("ari", [("capabilities", 4, 2, "mfvc_groups:0 acs_groups:1 next_function:15-8"), ("control", 6, 2, "")]),
    0x0F: (
        "ats",
        [
            ("capabilities", 4, 2, "invalidate_queue_depth:4-0 page_aligned:5 global_invalidate:6"),
            ("control", 6, 2, "smallest_unit:4-0 enable:15"),
        ],
    ),
    0x10: (
        "sriov",
        [
            ("capabilities", 0x04, 4, ""),
            ("control", 0x08, 2, "vf_enable:0 migration:1 migration_interrupt:2 vf_memory:3 ari_hierarchy:4"),
            ("status", 0x0A, 2, ""),
            ("initial_vfs", 0x0C, 2, ""),
            ("total_vfs", 0x0E, 2, ""),
            ("num_vfs", 0x10, 2, ""),
            ("dependency", 0x12, 1, ""),
            ("first_vf_offset", 0x14, 2, ""),
            ("vf_stride", 0x16, 2, ""),
            ("vf_device", 0x1A, 2, ""),
            ("supported_pages", 0x1C, 4, ""),
            ("system_page", 0x20, 4, ""),
            *((f"vf_bar{index}", 0x24 + 4 * index, 4, "") for index in range(6)),
        ],
    ),
    0x13: (
        "pri",
        [
            ("control", 4, 2, "enable:0 reset:1"),
            ("status", 6, 2, "~response_failure:0 ~unexpected_group:1 stopped:8 pasid_required:15"),
            ("capacity", 8, 4, ""),
            ("allocation", 12, 4, ""),
        ],
    ),
    0x15: (
        "rebar",
        [("capability", 4, 4, ""), ("control", 8, 4, "bar:2-0 count:7-5 size:13-8")],
    ),
    0x18: ("ltr", [("max_snoop", 4, 2, ""), ("max_no_snoop", 6, 2, "")]),
    0x1B: (
        "pasid",
        [
            ("capabilities", 4, 2, "execute:1 privileged:2 width:12-8"),
            ("control", 6, 2, "enable:0 execute:1 privileged:2"),
        ],
    ),
    0x1E: ("l1_substates", [("capabilities", 4, 4, ""), ("control1", 8, 4, ""), ("control2", 12, 4, "")]),
    0x1F: ("ptm", [("capabilities", 4, 4, ""), ("control", 8, 4, "enable:0 root_select:1")]),
    0x23: (
        "dvsec",
        [("header1", 4, 4, "vendor:15-0 revision:19-16 length:31-20"), ("header2", 8, 2, "")],
    ),
}
