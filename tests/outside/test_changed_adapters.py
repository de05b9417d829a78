"""An adapter that is not what its manifest describes: no command that reads its weights takes it."""

from __future__ import annotations

import shutil

import pytest

from tests.outside.commands import SOUND, command_line

ADAPTERS = ("draft", "verify", "pool/change", "bare")
CURVES = ("report curves", "adapters")  # reads the history in the manifest, and no weights


def uses():
    """Every parameter of a sound line that is given an adapter, and those of audit that one may be given."""
    yield "audit", "--merged", "draft"
    yield "audit", "--sources", "pool/change"
    for command, given in SOUND.items():
        for key, held in given.items():
            first = held if isinstance(held, str) else held[0]
            if first in ADAPTERS and key != "--role" and (command, key) != CURVES:
                yield command, key, first


@pytest.fixture(scope="module")
def changed(work):
    """Copies of the adapters of which one bit of one number is another."""
    for name in ADAPTERS:
        shutil.copytree(work / name, work / "changed" / name)
        file = work / "changed" / name / "adapters.safetensors"
        data = bytearray(file.read_bytes())
        data[-4] ^= 1  # the lowest bit of the last float32: finite, and as likely as before
        file.write_bytes(data)


def test_every_command_that_takes_an_adapter_is_tried():
    commands = {command for command, _, _ in uses()}
    known = {"audit", "merge", "fuse", "parity", "convert to-peft", "convert from-mlx", "convert to-gguf", "hub push"}
    assert known <= commands
    assert len(commands) >= 15


def test_a_changed_bit_is_refused_by_every_command(changed, outcomes, problems):
    tried = [use for use in uses() if use[0] not in ("lm-eval",)]
    lines = []
    for command, key, first in tried:
        line = command_line(command, key, f"changed/{first}")
        held = SOUND[command].get(key, "")
        lines.append(line if isinstance(held, str) else [*line, *held[1:]])
    for use, (_, ended) in zip(tried, outcomes(lines, 30), strict=True):
        assert not problems(ended), use
        assert ended["code"] == 2, use
        assert "its SHA-256 differs" in ended["stderr"], (use, ended["stderr"])
