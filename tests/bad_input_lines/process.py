"""Lines about settings of torch, the environment, the command line and the integrations."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd.cli import main
from fastkd.environment import EnvironmentValueError
from fastkd.integrations.liger import JSD, KLDivLoss
from fastkd.integrations.mdistiller import from_mdistiller
from fastkd.integrations.modelopt import LogitsDistillationLoss
from fastkd.integrations.trl import generalized_jsd_loss
from fastkd.ops import backend
from tests.bad_inputs import Gives, Line, Refused

from .common import S, T, W, Y, dkd, group, pairs_step, same_as, step
from .unusual import as_dtensor

LINES: list[Line] = []
NATIVE_LOSS = """
import torch, fastkd
fastkd.set_backend("native")
fastkd.kd_loss(torch.ones(2, 3), torch.ones(2, 3))
"""
ROOT = Path(__file__).resolve().parents[2]

add = group("Global settings of torch", LINES)


def float64_by_default() -> None:
    torch.set_default_dtype(torch.float64)


def meta_by_default() -> None:
    torch.set_default_device("meta")


def under(settings: Callable[[], Any], call: Callable[[], Any] = step) -> Callable[[], Any]:
    def run() -> Any:
        context = settings()
        with context if context is not None else contextlib.nullcontext():
            return call()

    return run


add("default dtype float64", under(float64_by_default), same_as(step))
add(
    "default dtype float64, labels and weights",
    under(float64_by_default, lambda: dkd(weight=W)),
    same_as(lambda: dkd(weight=W)),
)
for words, settings in (("dtype float64", float64_by_default), ("device meta", meta_by_default)):
    add(
        f"default {words}, no gradient",
        under(settings, lambda: fastkd.kd_loss(S, T)),
        same_as(lambda: fastkd.kd_loss(S, T)),
    )
add("default dtype float16", under(lambda: torch.set_default_dtype(torch.float16), dkd), same_as(dkd))
add(
    "default device meta",
    under(meta_by_default, lambda: dkd(weight=W)),
    same_as(lambda: dkd(weight=W)),
)
add(
    "default device meta, lists of pairs",
    under(meta_by_default, lambda: pairs_step([S, T], [T, S])),
    same_as(lambda: pairs_step([S, T], [T, S])),
)
add(
    "inference mode",
    under(torch.inference_mode, lambda: fastkd.kd_loss(S, T)),
    same_as(lambda: fastkd.kd_loss(S, T)),
)
add("autocast", under(lambda: torch.autocast("cpu", torch.bfloat16)), same_as(step))
add("deterministic algorithms", under(lambda: torch.use_deterministic_algorithms(True), dkd), same_as(dkd))
add("anomaly detection", under(lambda: torch.autograd.detect_anomaly(check_nan=True), dkd), same_as(dkd))

add = group("Environment and command line", LINES)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    chosen, backend._chosen = backend._chosen, os.environ.get("FASTKD_BACKEND") or "auto"
    try:
        yield
    finally:
        backend._chosen = chosen
        os.environ.clear()
        os.environ.update(before)


def command(*words: str, **variables: str) -> tuple[int, str]:
    """Status and error output of a command line."""
    said = io.StringIO()
    with (
        environment(**variables),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            status = main(list(words))
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, said.getvalue()


def ends(status: int, text: str) -> Gives:
    def holds(results: tuple[int, str]) -> bool:
        return results[0] == status and text in results[1] and "Traceback" not in results[1]

    return Gives(f"status {status}, “{text}”", holds=holds)


def python(code: str, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=ROOT,
    )
    return done.returncode, done.stderr


def first_loss(name: str) -> Any:
    with environment(FASTKD_BACKEND=name):
        return fastkd.kd_loss(S, T)


ONCE = ("eager",)
add(
    "FASTKD_BACKEND=nativ, first loss",
    lambda: first_loss("nativ"),
    Refused(EnvironmentValueError, "FASTKD_BACKEND is 'nativ'"),  # a ValueError
    ONCE,
)
add("FASTKD_BACKEND= (empty)", lambda: first_loss(""), same_as(lambda: fastkd.kd_loss(S, T)), ONCE)
add(
    "FASTKD_BACKEND=nativ fastkd doctor",
    lambda: command("doctor", FASTKD_BACKEND="nativ"),
    ends(2, "FASTKD_BACKEND is 'nativ'; expected one of auto"),
    ONCE,
)
add(
    "FASTKD_ISA=AVX2, first loss of the native backend",
    lambda: python(NATIVE_LOSS, FASTKD_ISA="AVX2"),
    Gives("an error that names FASTKD_ISA", holds=lambda r: r[0] != 0 and "FASTKD_ISA" in r[1]),
    ONCE,
)
add(
    "WORLD_SIZE=two fastkd train glyphs/kd",
    lambda: command("train", "glyphs/kd", WORLD_SIZE="two"),
    ends(2, "WORLD_SIZE is 'two'; expected an integer"),
    ONCE,
)
add("fastkd trian", lambda: command("trian"), ends(2, "invalid choice: 'trian'"), ONCE)
add("fastkd train glyphs/kdd", lambda: command("train", "glyphs/kdd"), ends(2, "glyphs/kdd"), ONCE)
add(
    "fastkd train glyphs/kd train.epoch=1",
    lambda: command("train", "glyphs/kd", "train.epoch=1"),
    ends(2, "epoch"),
    ONCE,
)
add(
    "fastkd check --losses kd",
    lambda: command("check", "--losses", "kd"),
    ends(2, "invalid choice: 'kd'"),
    ONCE,
)
add("fastkd recipes --all", lambda: command("recipes", "--all"), ends(2, "--all"), ONCE)
add(
    "set_backend('cuda')", lambda: fastkd.set_backend("cuda"), Refused(ValueError, "^backend is 'cuda'"), ONCE
)
add(
    "explain(device='cuda:99')",
    lambda: fastkd.explain(8, 100, device="cuda:99"),
    Refused(ValueError, "^device is 'cuda:99'"),
    ONCE,
)
add(
    "explain(device='gpu')",
    lambda: fastkd.explain(8, 100, device="gpu"),
    Refused(ValueError, "^device is 'gpu'"),
    ONCE,
)
add(
    "explain(loss='kl')",
    lambda: fastkd.explain(8, 100, loss="kl"),
    Refused(ValueError, "^loss is 'kl'"),
    ONCE,
)
add("explain(classes=1)", lambda: fastkd.explain(8, 1), Refused(ValueError, "classes 1"), ONCE)

add = group("Integrations", LINES)
KD = {"DISTILLER": {"TYPE": "KD"}}
for words, cfg, kind, pattern in (
    ("a KD file that leaves the temperature out", KD, ValueError, r"KD\.TEMPERATURE is not in cfg"),
    ("a misspelt key", {**KD, "KD": {"TEMPRATURE": 2}}, ValueError, r"nearest is KD\.TEMPERATURE"),
    ("a key of another fork", {**KD, "KD": {"BASE_TEMP": 2}}, ValueError, r"KD\.BASE_TEMP is no key"),
    ("another method", {"DISTILLER": {"TYPE": "CRD"}}, ValueError, "TYPE is 'CRD'"),
    (
        "LOGIT_STAND: 'False'",
        {**KD, "EXPERIMENT": {"LOGIT_STAND": "False"}},
        TypeError,
        "LOGIT_STAND is 'False'",
    ),
):
    add(f"from_mdistiller: {words}", lambda c=cfg: from_mdistiller(c), Refused(kind, pattern), ONCE)
add(
    "TRL: labels of another shape",
    lambda: generalized_jsd_loss(S, T, Y[:3]),
    Refused(ValueError, r"^labels has shape \[3\]"),
    ONCE,
)
add(
    "TRL: logits_are_probs",
    lambda: generalized_jsd_loss(S, T, logits_are_probs=True),
    Refused(ValueError, "^logits_are_probs"),
    ONCE,
)
add(
    "Liger JSD: shift_labels of another shape",
    lambda: JSD()(S, T, Y[:3]),
    Refused(ValueError, "^shift_labels has shape"),
    ONCE,
)
add("Liger KLDivLoss: log_target", lambda: KLDivLoss(log_target=True), Refused(TypeError, "log_target"), ONCE)
add(
    "Liger KLDivLoss: reduction='none'",
    lambda: KLDivLoss("none"),
    Refused(ValueError, "^reduction is 'none'"),
    ONCE,
)
add(
    "ModelOpt: other classes",
    lambda: LogitsDistillationLoss()(S, T[:, :5]),
    Refused(ValueError, "^logits_s has 6 classes and logits_t 5"),
    ONCE,
)
add(
    "TRL: labels a DTensor",
    lambda: generalized_jsd_loss(S, T, as_dtensor(Y)),
    Refused(TypeError, "^labels.*(to_local|full_tensor)"),
    ONCE,
)
