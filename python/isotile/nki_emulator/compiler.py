"""`nki.compiler` (0.7): configuration objects that the emulator accepts and does not need."""

from __future__ import annotations


class _Config:
    def __init__(self, **options):
        self.__dict__.update(options)


class CompileConfig(_Config):
    pass


class SpecializationConfig(_Config):
    pass


class AddressRotation(_Config):
    pass
