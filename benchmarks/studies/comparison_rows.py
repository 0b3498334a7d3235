"""The rows of each problem's table: a recipe and its overrides, by label; and the differences to print."""

from __future__ import annotations


def _rows(
    problem: str, layers: list[str], hint: list[str], relations: list[str], published: dict[str, list[str]]
) -> dict[str, list[str]]:
    """``layers`` are three stages of both models, of which the last gets the hint ``hint``.

    ``relations`` are RKD's weights, ``published`` a recipe's options where they are not the recipe's own. In
    the rows "other sizes" each stage of the student is paired with the teacher's stage before it, whose maps
    are twice as large.
    """
    first, second, third = layers
    no_hint = "method.hint_weight=0.0"
    hints = [f"method.hint_layer={third}", *hint]
    other_heads = [f"method.layers=[{second}, {third}]", f"method.teacher_layers=[{first}, {second}]"]

    def other(method: str, *options: str) -> list[str]:
        return [f"{problem}/kd", f"method={method}", *options]

    kd, dhkd, one_head = (
        [f"{problem}/{name}", *published.get(name, [])] for name in ("kd", "dhkd", "binary-kl-norm")
    )
    return {
        "labels alone": [f"{problem}/student"],
        "KD": kd,
        "LSKD": [f"{problem}/lskd"],
        "DKD": [f"{problem}/dkd"],
        "MHKD": [f"{problem}/mhkd"],
        "MHKD, other sizes": [f"{problem}/mhkd", *other_heads],
        "one head": one_head,
        "one head, raw teacher": [*one_head, "method.center_teacher=false"],
        "DHKD": dhkd,
        "DHKD, raw teacher": [*dhkd, "method.center_teacher=false"],
        "DHKD, nonlinear, aligned": [*dhkd, "method.head=nonlinear", "method.align=all"],
        "DHKD, nonlinear, not aligned": [*dhkd, "method.head=nonlinear", "method.align=none"],
        "DHKD, linear, aligned": [*dhkd, "method.head=linear", "method.align=all"],
        "DHKD, linear, not aligned": [*dhkd, "method.head=linear", "method.align=none"],
        "DCKD": [f"{problem}/dckd", no_hint],
        "DCKD, argmax": [f"{problem}/dckd", no_hint, "method.fix_acquired=argmax"],
        "hint": other("fitnets", *hints),
        "hint, other sizes": other("fitnets", *hints, f"method.hint_teacher_layer={second}"),
        "RKD": other("rkd", *relations),
        "DKD + hint": [f"{problem}/dkd", *hints],
        "DCKD + hint": [f"{problem}/dckd", *hints],
        "DKD + RKD": [f"{problem}/dkd", *relations],
        "DCKD + RKD": [f"{problem}/dckd", no_hint, *relations],
    }


def _linear(weight: str) -> list[str]:
    return ["method.hint_projection=linear", f"method.hint_weight={weight}"]


# The hint's layer, projection and weight, RKD's weights, and those of DHKD's loss: chosen for glyphs and
# Fashion-MNIST, published for emoji (CRD's benchmark and DHKD's release; the layer is ours).
# Angles cost N^3 D operations, too many for a glyph's 1,536 features, and three times the rest of a run on
# Fashion-MNIST.
_DISTANCES = ["method.distance_weight=5.0", "method.angle_weight=0.0"]
_RELATIONS = ["method.distance_weight=25.0", "method.angle_weight=50.0"]
_PUBLISHED = {
    "kd": ["method.kd_weight=0.9", "method.temperature=4.0"],
    "dhkd": ["method.alpha=1.0"],
    "binary-kl-norm": ["method.weight=1.0"],
}
_OPTIONS = {
    "glyphs": (["stages.0", "stages.1", "stages.2"], _linear("1.0"), _DISTANCES, {}),
    "fashion-mnist": (["stages.0", "stages.1", "stages.2"], _linear("0.01"), _DISTANCES, {}),
    "emoji": (["layer1", "layer2", "layer3"], ["method.hint_weight=100.0"], _RELATIONS, _PUBLISHED),
}
PROBLEMS = tuple(_OPTIONS)
# Rows of one problem: methods without a recipe of it, with the options chosen for it; and the options chosen
# for emoji, which its recipes of KD, DHKD, BinaryKL-Norm and DCKD have too, while its other rows have the
# published ones.
_CHOSEN_HINT = ["method.hint_layer=layer3", "method.hint_weight=10.0"]
_MORE = {
    "glyphs": {
        "NKD": ["glyphs/kd", "method=nkd", "method.gamma=6.0", "method.temperature=4.0"],
        "BinaryKL": ["glyphs/kd", "method=binary_kl", "method.weight=0.01", "method.temperature=2.0"],
    },
    "fashion-mnist": {
        "NKD": ["fashion-mnist/kd", "method=nkd", "method.gamma=0.75", "method.temperature=1.0"],
        "BinaryKL": [
            "fashion-mnist/kd", "method=binary_kl", "method.weight=0.0032", "method.temperature=2.0"
        ],
    },
    "emoji": {
        "KD, chosen weight": ["emoji/kd", "method.kd_weight=2.8", "method.temperature=2.0"],
        "DHKD, chosen weight": ["emoji/dhkd", "method.alpha=0.32"],
        "one head, chosen weight": ["emoji/binary-kl-norm", "method.weight=0.1"],
        "one head, DHKD's chosen weight": ["emoji/binary-kl-norm", "method.weight=0.32"],
        "DKD + hint, chosen weight": ["emoji/dkd", *_CHOSEN_HINT],
        "DCKD + hint, chosen weight": ["emoji/dckd", *_CHOSEN_HINT],
    },
}  # fmt: skip


def rows_of(problem: str) -> dict[str, list[str]]:
    return {**_rows(problem, *_OPTIONS[problem]), **_MORE.get(problem, {})}


_BESIDE_KD = ("LSKD", "DKD", "DCKD", "MHKD", "one head", "DHKD", "NKD", "BinaryKL")
# (first, second): the accuracy of the first minus that of the second.
DIFFERENCES = [
    *((label, "labels alone") for label in ("KD", *_BESIDE_KD)),
    *((label, "KD") for label in _BESIDE_KD),
    ("DHKD", "one head"),
    ("one head", "one head, raw teacher"),
    ("DHKD", "DHKD, raw teacher"),
    ("DHKD, nonlinear, aligned", "DHKD, nonlinear, not aligned"),
    ("DHKD, linear, aligned", "DHKD, linear, not aligned"),
    ("DHKD, nonlinear, aligned", "DHKD, linear, aligned"),
    ("DHKD, nonlinear, not aligned", "DHKD, linear, not aligned"),
    ("MHKD", "hint"),
    ("MHKD, other sizes", "KD"),
    ("MHKD, other sizes", "hint, other sizes"),
    ("DCKD", "DKD"),
    ("DCKD, argmax", "DCKD"),
    ("DCKD + hint", "DCKD"),
    ("DCKD + hint", "hint"),
    ("DCKD + hint", "DKD + hint"),
    ("DCKD + RKD", "DCKD"),
    ("DCKD + RKD", "RKD"),
    ("DCKD + RKD", "DKD + RKD"),
    ("KD, chosen weight", "KD"),
    ("DKD", "KD, chosen weight"),
    ("DCKD", "KD, chosen weight"),
    ("MHKD", "KD, chosen weight"),
    ("DHKD, chosen weight", "labels alone"),
    ("DHKD, chosen weight", "KD"),
    ("DHKD, chosen weight", "KD, chosen weight"),
    ("DHKD, chosen weight", "DHKD"),
    ("DHKD, chosen weight", "one head"),
    ("DHKD, chosen weight", "one head, chosen weight"),
    ("DHKD, chosen weight", "one head, DHKD's chosen weight"),
    ("one head, chosen weight", "one head"),
    ("one head, chosen weight", "KD, chosen weight"),
    ("DCKD + hint, chosen weight", "DCKD"),
    ("DCKD + hint, chosen weight", "hint"),
    ("DCKD + hint, chosen weight", "DKD + hint, chosen weight"),
    ("DKD + hint, chosen weight", "DKD"),
]
