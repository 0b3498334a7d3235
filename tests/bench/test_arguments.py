"""The arguments of ``fastkd bench``: what is refused before anything is measured."""

import pytest

from fastkd.bench import command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "trl"], "--peers trl is with --forms only"),
        (["--forms", "--peers", "native"], "--peers native is without --forms only"),
    ],
)
def test_names_of_the_other_kind_of_run_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["256", "0x10", "4x2", "ax10", "4x10x3"])
def test_bad_shapes(shape, capsys):
    with pytest.raises(SystemExit):
        command.main(["--shapes", shape])
    assert "is no shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step", "--losses", "kd"], "--losses has no effect with --step"),
        (["--step", "--time-limit", "3"], "--time-limit has no effect with --step"),
        (["--quick", "--shapes", "4x10"], "--shapes has no effect with --quick"),
        (["--forms", "--passes", "forward"], "--passes has no effect with --forms"),
        (["--step", "--time-limit", "0"], "--time-limit has no effect with --step"),
        (["--batch", "4"], "--batch has no effect without --step"),
        (["--step", "--peers", "native"], "--peers native has no effect with --step; its peers are eager"),
    ],
)
def test_options_without_effect(words, said, tmp_path, capsys):
    assert command.main([*words, "--device", "cpu", "--output", str(tmp_path / "new.jsonl")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize("option", ["--seconds", "--memory", "--time-limit"])
@pytest.mark.parametrize("text", ["nan", "-1", "inf", "x"])
def test_numbers_that_are_none(option, text, capsys):
    with pytest.raises(SystemExit):
        command.main([option, text])
    assert "expected a number from 0" in capsys.readouterr().err
