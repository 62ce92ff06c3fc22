"""Triton kernels run by its interpreter on the CPU: `TRITON_INTERPRET=1 python -m pytest tests/interpreter`.

Triton reads the switch when a kernel is decorated, so these tests have a process of their own. They are in fp32 and fp16: in bf16 the
interpreter is silently wrong.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 in the environment, set before Python starts")
