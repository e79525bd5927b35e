"""What the NVM Express specifications write down, for both ends: the driver and the emulated controller.

Tables and layouts only: ``registers`` (BAR 0), ``structures`` (what lies in memory), ``opcodes``, ``status``.
"""
