"""Parts of a `TrainConfig` that have fields of their own: adapters and preferences. Plain data, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava_fast.checks import is_int, is_number, require

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraOptions:
    """Adapters on the decoder's linears (LoRA). Defaults are LLaVA-NeXT's (llava/train/train.py); LLaVA-1.5's script has r 128, alpha 256.

    r: rank.  alpha: the adapter's product is scaled by alpha / r.  dropout: of its input.  targets: kinds of linears, by name.
    base: 'int8', 'int4' or 'fp8': the frozen weights under the adapters in that type (QLoRA); None: as the run's precision has them.
    """

    r: int = 64
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = LINEARS
    base: Literal["int8", "int4", "fp8"] | None = None  # ours

    def __post_init__(self) -> None:
        require(is_int(self.r) and self.r >= 1, "lora.r", self.r, "an integer >= 1")
        require(is_number(self.alpha) and self.alpha > 0, "lora.alpha", self.alpha, "a number > 0")
        require(is_number(self.dropout) and 0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number in [0, 1)")
        targets = self.targets if isinstance(self.targets, (list, tuple)) else ()
        known = bool(targets) and all(isinstance(name, str) and name in LINEARS for name in targets)
        require(known, "lora.targets", self.targets, f"some of {', '.join(LINEARS)}")
        object.__setattr__(self, "targets", tuple(dict.fromkeys(targets)))
        require(self.base in (None, "int8", "int4", "fp8"), "lora.base", self.base, "int8, int4, fp8 or None")


@dataclass(frozen=True)
class DpoOptions:
    """Preference optimisation (arXiv 2305.18290). Defaults are those of LLaVA-NeXT's scripts (train_dpo.py, scripts/train/dpo*.sh).

    With h = (log p(chosen) - log p(rejected)) - the same of the reference model, a pair's loss is alpha * L + gamma * CE(chosen).
    loss: what L is; 'sigmoid': -log sigmoid(beta h); 'hinge': max(0, 1 - beta h); 'ipo': (h - 1 / (2 beta))^2, with means over tokens
    in place of sums. CE(chosen) is a mean over the chosen answer's tokens.
    upstream: do as train_dpo.py does: one <image> in front of the prompt whatever marks it has (so one picture or video at most), and what
    the template supervises in the prompt counts too. Otherwise marks stay where they are and answers alone count.
    """

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: float = 0.1
    alpha: float = 1.0
    gamma: float = 0.0
    upstream: bool = False

    def __post_init__(self) -> None:
        require(self.loss in ("sigmoid", "hinge", "ipo"), "dpo.loss", self.loss, "sigmoid, hinge or ipo")
        require(is_number(self.beta) and self.beta > 0, "dpo.beta", self.beta, "a number > 0")
        for name in ("alpha", "gamma"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, f"dpo.{name}", value, "a number >= 0")
        require(self.alpha + self.gamma > 0, "dpo.alpha, dpo.gamma", 0, "not both 0")
        require(isinstance(self.upstream, bool), "dpo.upstream", self.upstream, "true or false")
