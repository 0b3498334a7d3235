"""Distillation methods: two models, a loss with its options, and modules that only training needs."""

from .alignment import GradientAlignment
from .classifier import find_classifier
from .dhkd import DHKD
from .given import GivenFeatures, GivenLogits, GivenTeacher, GivenTopK
from .logits import DCKD, DKD, KD, LSKD, NKD, RKD, BinaryKL, BinaryKLNorm, CrossEntropy, FitNets
from .loss_method import LossMethod
from .method import Method, Seen, find_method
from .mhkd import MHKD
from .options import Count, Epochs, File, Fraction, OptionError, Positive, Weight, check_options, options_of
from .taps import FeatureError, Taps
from .terms import Terms, fused_terms

__all__ = [
    "DCKD",
    "DHKD",
    "DKD",
    "KD",
    "LSKD",
    "MHKD",
    "NKD",
    "RKD",
    "BinaryKL",
    "BinaryKLNorm",
    "Count",
    "CrossEntropy",
    "Epochs",
    "FeatureError",
    "File",
    "FitNets",
    "Fraction",
    "GivenFeatures",
    "GivenLogits",
    "GivenTeacher",
    "GivenTopK",
    "GradientAlignment",
    "LossMethod",
    "Method",
    "OptionError",
    "Positive",
    "Seen",
    "Taps",
    "Terms",
    "Weight",
    "check_options",
    "find_classifier",
    "find_method",
    "fused_terms",
    "options_of",
]
