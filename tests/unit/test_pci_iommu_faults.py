"""Fault messages as people have seen them: each line below came out of a real machine, or is its driver's format."""

# ruff: noqa: E501  the kernel folds no lines
from __future__ import annotations

import pytest

from vfiopy.pci import PciAddress
from vfiopy.pci.iommu_faults import FaultDecoder, IommuFault, is_fault_line


def decode(*lines: str) -> list[IommuFault]:
    decoder = FaultDecoder()
    faults = [fault for line in lines for fault in decoder.feed(line)]
    return faults + decoder.flush()


def one(*lines: str) -> IommuFault:
    (fault,) = decode(*lines)
    return fault


IGD = PciAddress.parse("0000:00:02.0")


class TestIntel:
    def test_since_linux_5_13(self) -> None:
        text = "DMAR: [DMA Read NO_PASID] Request device [00:02.0] fault addr 0x7cd80000 [fault reason 0x06] PTE Read access is not set"
        assert one(text) == IommuFault(
            "intel", IGD, address=0x7CD80000, write=False, reason="PTE Read access is not set", code=6
        )

    def test_7_3_has_a_domain(self) -> None:
        text = "DMAR: [DMA Read NO_PASID] Request device [0001:00:04.0] fault addr 0x100000 [fault reason 0x06] PTE Read access is not set"
        fault = one(text)
        assert (str(fault.source), fault.address, fault.write) == ("0001:00:04.0", 0x100000, False)

    def test_for_a_few_releases_the_device_had_prefixes(self) -> None:
        text = "DMAR: [DMA Read NO_PASID] Request device [0x00:0x02.0] fault addr 0x70ad5000 [fault reason 0x0c] non-zero reserved fields in PTE"
        fault = one(text)
        assert (fault.source, fault.code, fault.address) == (IGD, 0x0C, 0x70AD5000)

    def test_with_a_pasid(self) -> None:
        text = "DMAR: [DMA Write PASID 0x5] Request device [6a:01.0] fault addr 0x7f1200001000 [fault reason 0x71] SM: Present bit in first-level paging entry is clear"
        fault = one(text)
        assert (fault.pasid, fault.write, str(fault.source)) == (5, True, "0000:6a:01.0")

    def test_before_5_13_all_ones_stood_for_no_pasid_and_reasons_were_decimal(self) -> None:
        text = "DMAR: [DMA Read] Request device [00:02.0] PASID ffffffff fault addr 9c000000 [fault reason 11] non-zero reserved fields in PTE"
        fault = one(text)
        assert (fault.pasid, fault.address, fault.code) == (None, 0x9C000000, 11)

    def test_before_5_0_there_was_no_pasid_at_all(self) -> None:
        text = "DMAR: [DMA Write] Request device [00:12.0] fault addr 0 [fault reason 05] PTE Write access is not set"
        assert one(text) == IommuFault(
            "intel",
            PciAddress.parse("00:12.0"),
            address=0,
            write=True,
            reason="PTE Write access is not set",
            code=5,
        )

    def test_an_interrupt_has_no_address(self) -> None:
        text = "DMAR: [INTR-REMAP] Request device [f0:1f.7] fault index 0x8000 [fault reason 0x25] Blocked a compatibility format interrupt request"
        fault = one(text)
        assert (fault.interrupt, fault.address, fault.write, fault.code) == (True, None, None, 0x25)
        assert "interrupt refused" in str(fault)


class TestAmd:
    @pytest.mark.parametrize(
        ("flags", "write", "reason"),
        [
            ("0x0000", None, "page not mapped"),
            ("0x0020", True, "page not mapped"),
            ("0x0050", False, "permission denied"),
            ("0x0070", True, "permission denied"),
            ("0x00f0", True, "reserved bits set in the page table"),
        ],
    )
    def test_flags(self, flags: str, write: bool | None, reason: str) -> None:
        text = f"ahci 0000:06:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0000 address=0x423d8d980 flags={flags}]"
        assert one(text) == IommuFault(
            "amd",
            PciAddress.parse("06:00.0"),
            address=0x423D8D980,
            write=write,
            reason=reason,
            code=int(flags, 16),
        )

    def test_without_a_driver_the_device_is_a_field(self) -> None:
        text = "AMD-Vi: Event logged [IO_PAGE_FAULT device=07:00.0 domain=0x0007 address=0xffffc02000 flags=0x0000]"
        assert str(one(text).source) == "0000:07:00.0"

    def test_since_6_0_with_its_domain(self) -> None:
        text = "AMD-Vi: Event logged [IO_PAGE_FAULT device=0001:00:0c.0 domain=0x0000 address=0x7e800000 flags=0x0050]"
        assert str(one(text).source) == "0001:00:0c.0"

    def test_other_events(self) -> None:
        text = "AMD-Vi: Event logged [INVALID_DEVICE_REQUEST device=00:00.1 pasid=0x00000 address=0xfdf8000020 flags=0x0a00]"
        fault = one(text)
        assert (fault.address, fault.reason, fault.pasid) == (
            0xFDF8000020,
            "a request that the device may not make",
            None,
        )

    def test_old_kernels_broke_the_line(self) -> None:
        lines = (
            "AMD-Vi: Event logged [",
            "IO_PAGE_FAULT device=05:00.0 domain=0x0012 address=0x00000000ff6101b0 flags=0x0070]",
        )
        fault = one(*lines)
        assert (fault.address, fault.write) == (0xFF6101B0, True)


class TestArmSmmu:
    def test_context_fault(self) -> None:
        text = "arm-smmu fd800000.smmu: Unhandled context fault: fsr=0x402, iova=0x3165687460, fsynr=0x20001, cbfrsynra=0x877, cb=1"
        assert one(text) == IommuFault(
            "arm-smmu", None, stream=0x877, address=0x3165687460, write=False, reason="translation fault", code=0x402
        )

    def test_a_write_that_was_not_permitted(self) -> None:
        text = "arm-smmu 5000000.iommu: Unhandled context fault: fsr=0x408, iova=0x86000a60, fsynr=0x1c0012, cb=0"
        fault = one(text)
        assert (fault.write, fault.reason, fault.stream) == (True, "permission fault", None)

    def test_an_unknown_stream(self) -> None:
        text = 'arm-smmu arm-smmu.1.auto: Blocked unknown Stream ID 0x22e0; boot with "arm-smmu.disable_bypass=0" to allow, but this may have security implications'
        fault = one(text)
        assert (fault.stream, fault.address) == (0x22E0, None)
        assert str(fault) == "stream 0x22e0: access refused: no context for this stream ID"


RECORD = (
    "arm-smmu-v3 fc900000.iommu: event 0x10 received:",
    "arm-smmu-v3 fc900000.iommu:      0x0000010000000010",
    "arm-smmu-v3 fc900000.iommu:      0x0000020000000000",
    "arm-smmu-v3 fc900000.iommu:      0x000000090000f040",
    "arm-smmu-v3 fc900000.iommu:      0x0000000000000000",
)
WORDS = (
    "arm-smmu-v3 fc900000.iommu: event: F_TRANSLATION client: 0000:01:00.0 sid: 0x100 ssid: 0x0 iova: 0x90000f040 ipa: 0x0",
    'arm-smmu-v3 fc900000.iommu: unpriv data write s1 "Input address caused fault" stag: 0x0',
)


class TestArmSmmu3:
    def test_the_record_alone(self) -> None:
        assert one(*RECORD) == IommuFault(
            "arm-smmu-v3",
            None,
            stream=0x100,
            address=0x90000F040,
            write=True,
            reason="page not mapped (F_TRANSLATION)",
            code=0x10,
        )

    def test_record_and_words_are_one_fault(self) -> None:
        fault = one(*RECORD, *WORDS)
        assert (str(fault.source), fault.stream, fault.address, fault.write) == (
            "0000:01:00.0",
            0x100,
            0x90000F040,
            True,
        )

    def test_words_without_the_record(self) -> None:
        fault = one(*WORDS)
        assert (str(fault.source), fault.address, fault.write, fault.code) == ("0000:01:00.0", 0x90000F040, True, 0x10)

    def test_a_read(self) -> None:
        read = (RECORD[0], RECORD[1], RECORD[2].replace("0x0000020000000000", "0x0000020a00000000"), *RECORD[3:])
        assert one(*read).write is False

    def test_many_faults_of_two_smmus_interleaved(self) -> None:
        other = [line.replace("fc900000", "fc800000").replace("90000f040", "001234000") for line in (*RECORD, *WORDS)]
        faults = decode(*(line for pair in zip((*RECORD, *WORDS), other, strict=True) for line in pair), *RECORD, *RECORD)
        assert [fault.address for fault in faults] == [0x90000F040, 0x1234000, 0x90000F040, 0x90000F040]

    def test_another_line_ends_a_record(self) -> None:
        decoder = FaultDecoder()
        assert [fault for line in RECORD for fault in decoder.feed(line)] == []
        assert len(decoder.feed("eth3: link up")) == 1
        assert decoder.flush() == []

    def test_a_record_that_was_cut_off(self) -> None:
        assert one(*RECORD[:3]).reason == "page not mapped (F_TRANSLATION)"

    def test_a_configuration_fault_has_no_address(self) -> None:
        bad = [RECORD[0].replace("0x10", "0x02"), RECORD[1].replace("10000000010", "10000000002"), *RECORD[2:]]
        fault = one(*bad)
        assert (fault.address, fault.write, fault.reason) == (None, None, "unknown stream ID (C_BAD_STREAMID)")


class TestVirtio:
    def test_without_flags(self) -> None:
        text = "virtio_iommu virtio0: page fault from EP 32 at 0x103231000 []"
        assert one(text) == IommuFault(
            "virtio",
            None,
            stream=32,
            address=0x103231000,
            write=None,
            reason="page not mapped, or permission denied",
        )

    def test_write(self) -> None:
        assert one("virtio_iommu virtio0: page fault from EP 8 at 0x1000 [W]").write is True

    def test_without_address(self) -> None:
        fault = one("virtio_iommu virtio0: domain fault from EP 8")
        assert (fault.address, fault.reason) == (None, "the endpoint is attached to no domain")


@pytest.mark.parametrize(
    "text",
    [
        "DMAR: DRHD: handling fault status reg 3",
        "DMAR: IOMMU enabled",
        "AMD-Vi: Interrupt remapping enabled",
        "arm-smmu-v3 fc900000.iommu: ias 44-bit, oas 44-bit (features 0x00001fef)",
        "vfio-pci 0000:00:02.0: vfio_ecap_init: hiding ecap 0x1b@0x100",
        "",
    ],
)
def test_what_is_no_fault(text: str) -> None:
    assert decode(text) == []
    assert not is_fault_line(text)


@pytest.mark.parametrize("text", [*RECORD, *WORDS])
def test_lines_that_are_a_part_of_one(text: str) -> None:
    assert is_fault_line(text)
