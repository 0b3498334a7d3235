"""mdistiller's, torch's, Liger's, ModelOpt's and TRL's conventions, against their formulas written out."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastkd.bench.peers import eager_dkd
from fastkd.integrations.liger import JSD, KLDivLoss
from fastkd.integrations.mdistiller import from_mdistiller
from fastkd.integrations.modelopt import LogitsDistillationLoss
from fastkd.integrations.trl import generalized_jsd_loss


def logits(*shape):
    student, teacher = 3 * torch.randn(2, *shape)
    return student.requires_grad_(), teacher


def assert_same(ours, theirs, student):
    """Value and gradient of two losses of the same student logits."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradient, their_gradient = (torch.autograd.grad(loss, student)[0] for loss in (ours, theirs))
    assert (gradient - their_gradient).norm() <= 1e-5 * their_gradient.norm()


def kd(student, teacher, temperature):
    log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


class TestMDistiller:
    def test_kd(self):
        cfg = {
            "DISTILLER": {"TYPE": "KD"},
            "KD": {"TEMPERATURE": 2, "LOSS": {"CE_WEIGHT": 0.3, "KD_WEIGHT": 3}},
        }
        (student, teacher), target = logits(7, 30), torch.randint(0, 30, (7,))
        loss, terms = from_mdistiller(cfg)(student, teacher, target)
        assert_same(loss, 0.3 * F.cross_entropy(student, target) + 3 * kd(student, teacher, 2), student)
        assert set(terms) == {"ce", "kd"}

    @pytest.mark.parametrize(
        ("defaults", "weight", "temperature"), [("mdistiller", 0.9, 4), ("logit-standardization-KD", 9, 2)]
    )
    def test_defaults_are_those_of_the_project_named(self, defaults, weight, temperature):
        (student, teacher), target = logits(7, 30), torch.randint(0, 30, (7,))
        cfg = {"DISTILLER": {"TYPE": "KD"}, "EXPERIMENT": {"LOGIT_STAND": False}}
        loss, _ = from_mdistiller(cfg, defaults=defaults)(student, teacher, target)
        soft = weight * kd(student, teacher, temperature)
        assert_same(loss, 0.1 * F.cross_entropy(student, target) + soft, student)

    def test_defaults_on_which_the_projects_agree_need_no_name(self):
        (student, teacher), target = logits(7, 30), torch.randint(0, 30, (7,))
        loss, _ = from_mdistiller({})(student, teacher, target)
        assert_same(loss, F.cross_entropy(student, target), student)

    def test_the_yaml_file_does_not_say_of_which_project_it_is(self):
        """But for the tag both ship this for KD on CIFAR-100: T 4 and 0.9 in one, 2 and 9 in the other."""
        cfg = {
            "EXPERIMENT": {"NAME": "", "TAG": "kd,resnet32x4,resnet8x4,2,9", "PROJECT": "cifar100_baselines"},
            "DISTILLER": {"TYPE": "KD", "TEACHER": "resnet32x4", "STUDENT": "resnet8x4"},
            "SOLVER": {
                "BATCH_SIZE": 64, "EPOCHS": 240, "LR": 0.05, "LR_DECAY_STAGES": [150, 180, 210],
                "LR_DECAY_RATE": 0.1, "WEIGHT_DECAY": 0.0005, "MOMENTUM": 0.9, "TYPE": "SGD",
            },
        }  # fmt: skip
        with pytest.raises(
            ValueError, match=r"KD\.TEMPERATURE is not in cfg.*4 in mdistiller, 2 in logit-stand"
        ):
            from_mdistiller(cfg)
        with pytest.raises(ValueError, match=r"LOGIT_STAND is not in cfg.*--logit-stand"):
            from_mdistiller(cfg, defaults="logit-standardization-KD")
        cfg["EXPERIMENT"]["LOGIT_STAND"] = True
        loss = from_mdistiller(cfg, defaults="logit-standardization-KD")
        assert (loss.temperature, loss.standardize) == (2.0, True)
        assert loss.weights == {"ce_weight": 0.1, "kd_weight": 9.0}
        plain = from_mdistiller({**cfg, "EXPERIMENT": {}}, defaults="mdistiller")
        assert (plain.temperature, plain.standardize, plain.weights["kd_weight"]) == (4.0, False, 0.9)

    @pytest.mark.parametrize("epoch", [1, 7, 20, 31])
    def test_dkd_warms_up(self, epoch):
        (student, teacher), target = logits(7, 30), torch.randint(0, 30, (7,))
        loss, _ = from_mdistiller({"DISTILLER": {"TYPE": "DKD"}})(student, teacher, target, epoch=epoch)
        theirs = F.cross_entropy(student, target) + min(epoch / 20, 1) * eager_dkd(student, teacher, target)
        assert_same(loss, theirs, student)

    def test_logit_standardisation(self):
        cfg = {
            "DISTILLER": {"TYPE": "KD"},
            "EXPERIMENT": {"LOGIT_STAND": True},
            "KD": {"TEMPERATURE": 2, "LOSS": {"KD_WEIGHT": 0.9}},
        }
        (student, teacher), target = logits(7, 30), torch.randint(0, 30, (7,))
        standard = [
            (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (student, teacher)
        ]
        loss, _ = from_mdistiller(cfg)(student, teacher, target)
        assert_same(loss, 0.1 * F.cross_entropy(student, target) + 0.9 * kd(*standard, 2), student)

    def test_a_real_config_node(self):
        yacs = pytest.importorskip("yacs.config")
        node = yacs.CfgNode({"DISTILLER": {"TYPE": "DKD"}, "DKD": {"BETA": 2.0, "WARMUP": 1}})
        loss = from_mdistiller(node)
        assert loss.weights == {"ce_weight": 1.0, "tckd_weight": 1.0, "nckd_weight": 2.0}

    @pytest.mark.parametrize(
        ("cfg", "message"),
        [
            ({"DISTILLER": {"TYPE": "CRD"}}, "TYPE is 'CRD'"),
            ({"DISTILLER": {"TYPE": "KD"}, "KD": {"TEMPERATURE": "4"}}, "KD.TEMPERATURE is '4'"),
            ({"DISTILLER": {"TYPE": "KD"}, "KD": {"TEMPERATURE": True}}, "KD.TEMPERATURE is True"),
            (
                {"DISTILLER": {"TYPE": "KD"}, "KD": {"TEMPERATURE": 0, "LOSS": {"KD_WEIGHT": 1}}},
                "KD.TEMPERATURE is 0",
            ),
            ({"DISTILLER": {"TYPE": "DKD"}, "DKD": {"BETA": float("inf")}}, "DKD.BETA is inf"),
            ({"DISTILLER": {"TYPE": "DKD"}, "DKD": {"WARMUP": 0}}, "DKD.WARMUP is 0"),
            (
                {"DISTILLER": {"TYPE": "KD"}, "KD": {"TEMPRATURE": 2}},
                r"KD\.TEMPRATURE .*nearest is KD\.TEMPERATURE",
            ),
            ({"DISTILLER": {"TYPE": "KD"}, "KD": {"T": 2}}, r"KD\.T is no key .*nearest is KD\.TEMPERATURE"),
            (
                {"DISTILLER": {"TYPE": "KD"}, "KD": {"LOSS": {"WEIGHT": 2}}},
                r"KD\.LOSS\.WEIGHT .*nearest is KD\.LOSS",
            ),
            ({"DISTILER": {"TYPE": "KD"}}, r"DISTILER is no key .*nearest is DISTILLER"),
            ({"EXPERIMENT": {"LOGIT_STANDARD": True}}, r"nearest is EXPERIMENT\.LOGIT_STAND"),
            ({"DISTILLER": {"TYPE": "KD"}, "EXPERIMENT": {"LOGIT_STAND": "False"}}, "LOGIT_STAND is 'False'"),
            ({"DISTILLER": "KD"}, "DISTILLER is 'KD'"),
            ("KD", "cfg is a str"),
        ],
    )
    def test_bad_config(self, cfg, message):
        with pytest.raises((TypeError, ValueError), match=message):
            from_mdistiller(cfg)

    def test_a_warm_up_needs_the_epoch(self):
        of_one = {"DISTILLER": {"TYPE": "DKD"}, "DKD": {"WARMUP": 1}}
        from_mdistiller(of_one)(*logits(3, 5), torch.tensor([0, 1, 2]))  # it is none
        with pytest.raises(TypeError, match="epoch is missing"):
            from_mdistiller({"DISTILLER": {"TYPE": "DKD"}})(*logits(3, 5), torch.tensor([0, 1, 2]))
        with pytest.raises(ValueError, match="epoch is 0"):
            from_mdistiller({"DISTILLER": {"TYPE": "DKD"}})(*logits(3, 5), torch.tensor([0, 1, 2]), epoch=0)

    def test_rows_alone(self):
        with pytest.raises(ValueError, match=r"shape \[3, 5, 4\]; expected \[N, C\]"):
            from_mdistiller({})(*logits(3, 5, 4), torch.ones(3, 5, dtype=torch.int64))

    def test_defaults_by_another_name(self):
        with pytest.raises(ValueError, match="defaults is 'lskd'; expected one of mdistiller"):
            from_mdistiller({}, defaults="lskd")


@pytest.mark.parametrize("shape", [(6, 40), (2, 5, 40)], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_kl_div_is_that_of_torch(reduction, shape):
    student, teacher = logits(*shape)
    theirs = nn.KLDivLoss(reduction=reduction)(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1))
    assert_same(KLDivLoss(reduction, temperature=2.0)(student, teacher), theirs, student)
    # log_softmax leaves log-probabilities as they are.
    log_p = teacher.log_softmax(-1)
    theirs = nn.KLDivLoss(reduction=reduction, log_target=True)(F.log_softmax(student, -1), log_p)
    assert_same(KLDivLoss(reduction)(student.log_softmax(-1), log_p), theirs, student)


def test_the_defaults_are_those_of_what_is_replaced():
    student, teacher = logits(2, 5, 40)
    trained = teacher.clone().requires_grad_()  # as ModelOpt's may be
    for ours in (
        KLDivLoss()(student, teacher),
        LogitsDistillationLoss()(student, teacher),
        LogitsDistillationLoss()(student, trained),
    ):
        theirs = nn.KLDivLoss()(F.log_softmax(student, -1), F.softmax(teacher, -1))
        assert_same(ours, theirs, student)
    for ours, divisor in ((generalized_jsd_loss(student, teacher), 2), (JSD()(student, teacher), 10)):
        theirs = generalized_jsd(student, teacher, 0.5, 1.0).sum() / divisor
        assert_same(ours, theirs, student)


def test_kl_div_refuses_what_it_has_not():
    with pytest.raises(ValueError, match="reduction is 'none'"):
        KLDivLoss("none")


@pytest.mark.parametrize("shape", [(6, 40), (2, 5, 40)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_modelopt_loss(reduction, shape):
    student, teacher = logits(*shape)
    log_q, p = F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1)
    theirs = F.kl_div(log_q, p, reduction=reduction) * 9
    loss = LogitsDistillationLoss(3.0, reduction)(student, teacher)
    if reduction == "none":
        theirs = theirs.sum(-1)
        torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
        loss, theirs = loss.sum(), theirs.sum()
    assert_same(loss, theirs, student)


def test_modelopt_itself():
    """As the criterion of ModelOpt's own distillation, where it is installed."""
    mtd = pytest.importorskip("modelopt.torch.distill", reason="ModelOpt is not installed")
    gradients = []
    for criterion in (mtd.LogitsDistillationLoss(temperature=2.0), LogitsDistillationLoss(temperature=2.0)):
        torch.manual_seed(1)
        student, teacher = nn.Linear(5, 9), nn.Linear(5, 9)
        model = mtd.convert(student, [("kd_loss", {"teacher_model": teacher, "criterion": criterion})])
        model.train()
        model(torch.randn(8, 5))
        model.compute_kd_loss().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def generalized_jsd(student, teacher, beta, temperature):
    """Elements [..., C], as the GKD paper has them."""
    log_q, log_p = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    if beta in (0.0, 1.0):
        first, second = (log_p, log_q) if beta == 0.0 else (log_q, log_p)
        return first.exp() * (first - second)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)


S, T = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
LABELS = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: generalized_jsd_loss(S, T, LABELS[0]), ValueError, r"^labels has shape \[5\]; expected \[2"),
        (lambda: generalized_jsd_loss(S, T, LABELS[:, 1:]), ValueError, r"^labels has shape \[2, 4\]"),
        (lambda: generalized_jsd_loss(S, T, LABELS.bool()), TypeError, r"^labels has dtype torch.bool"),
        (lambda: generalized_jsd_loss(S, T, [1, 2]), TypeError, "^labels is a list"),
        (lambda: generalized_jsd_loss([S], [T]), TypeError, "^student_logits is a list"),
        (
            lambda: generalized_jsd_loss(S, T, None, 0.5, 1.0, "sum", False),
            TypeError,
            "^num_items_in_batch is False",
        ),
        (lambda: generalized_jsd_loss(S, T, reduction="none"), ValueError, "^reduction is 'none'"),
        (lambda: JSD()(S, T, LABELS[0]), ValueError, r"^shift_labels has shape \[5\]"),
        (lambda: JSD()(S, T, LABELS.float()), TypeError, "^shift_labels has dtype torch.float32"),
        (lambda: JSD(ignore_index="a"), TypeError, "^ignore_index is 'a'"),
        (lambda: JSD(beta=1.5), ValueError, "^beta is 1.5"),
        (lambda: KLDivLoss()([S], [T]), TypeError, "^student_logits is a list"),
        (lambda: LogitsDistillationLoss()(S, T[:, 1:]), ValueError, "^logits_s has shape .* and logits_t"),
        (lambda: LogitsDistillationLoss()(S.long(), T), TypeError, "^logits_s has dtype torch.int64"),
        (lambda: LogitsDistillationLoss()(S, [T]), TypeError, "^logits_t is a list"),
    ],
)  # fmt: skip
def test_errors_name_what_the_user_gave(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 3, 4, 40)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_modelopt_itself_of_each_shape(reduction, shape):
    theirs = pytest.importorskip("modelopt.torch.distill", reason="ModelOpt is not installed")
    student, teacher = logits(*shape)
    values = [
        loss_class(3.0, reduction)(student, teacher).sum()
        for loss_class in (LogitsDistillationLoss, theirs.LogitsDistillationLoss)
    ]
    assert_same(*values, student)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_liger_jsd(beta, masked):
    student, teacher = logits(9, 40)
    labels = torch.tensor([1, -100, 3, 4, -100, 6, 7, 8, 9]) if masked else None
    elements = generalized_jsd(student, teacher, beta, 1.0)
    theirs = elements[labels != -100].sum() / 7 if masked else elements.sum() / 9
    assert_same(JSD(beta)(student, teacher, labels), theirs, student)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "items"])
@pytest.mark.parametrize("masked", [False, True])
def test_trl_loss(beta, reduction, masked):
    student, teacher = logits(2, 5, 40)
    labels = torch.tensor([[1, -100, 3, 4, 5], [-100, -100, 8, 9, 1]]) if masked else None
    elements = generalized_jsd(student, teacher, beta, 0.9)
    total = elements[labels != -100].sum() if masked else elements.sum()
    options = {"num_items_in_batch": torch.tensor(11)} if reduction == "items" else {"reduction": reduction}
    divisor = {"items": 11, "sum": 1, "batchmean": 7 if masked else 2}[reduction]
    ours = generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=0.9, **options)
    assert_same(ours, total / divisor, student)


def test_trl_loss_without_a_token_left():
    student, teacher = logits(2, 3, 8)
    loss = generalized_jsd_loss(student, teacher, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
    with pytest.raises(ValueError, match="logits_are_probs"):
        generalized_jsd_loss(student, teacher, logits_are_probs=True)


def test_trl_itself():
    """Beside the real trainer's function, where TRL is installed."""
    gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is not installed")
    original = gkd.GKDTrainer.generalized_jsd_loss
    parameters = list(inspect.signature(original).parameters)
    assert list(inspect.signature(generalized_jsd_loss).parameters)[: len(parameters)] == parameters
    for shape, labels in (
        ((2, 5, 40), torch.tensor([[1, -100, 3, 4, 5], [-100, -100, 8, 9, 1]])),
        ((2, 5, 40), None),
        ((5, 40), torch.tensor([1, -100, 3, 4, 5])),
        ((40,), None),
    ):
        student, teacher = logits(*shape)
        for reduction in ("batchmean", "sum"):
            arguments = (student, teacher, labels, 0.3, 0.9, reduction)
            assert_same(generalized_jsd_loss(*arguments), original(*arguments), student)
