"""Fixtures: one tiny checkpoint of each kind a test process, and transformers' model of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "0" if os.environ.get("LLAVA_FAST_ONLINE") == "1" else "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import tiny
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    return {kind: tiny.make_checkpoint(tmp_path_factory.mktemp(kind) / "model", kind) for kind in tiny.KINDS}


@pytest.fixture(params=tiny.KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def directory(checkpoints, kind) -> Path:
    return checkpoints[kind]


@pytest.fixture
def hf(directory) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def processor(directory):
    return AutoProcessor.from_pretrained(directory)
