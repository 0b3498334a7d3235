"""The option --suite of ``pytest benchmarks --benchmark-only``."""


def pytest_addoption(parser):
    parser.addoption(
        "--suite",
        choices=("quick", "full"),
        default="quick",
        help="the cases of `fastkd bench --quick` or of `fastkd bench` (default: quick)",
    )
