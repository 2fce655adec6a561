"""hf-cod compare: several runs in one picture."""

from hf_cod.cli.main import main
from tests.cli.runs import diagnose


def test_compare_puts_two_runs_in_one_picture(checkpoint, capsys):
    assert diagnose(checkpoint) == 0
    run, out = str(checkpoint / "run"), str(checkpoint / "both")
    assert main(["compare", run, run, "--labels", "left", "right", "--output", out]) == 0
    assert "effective depth" in capsys.readouterr().out
    assert (checkpoint / "both" / "compare.png").is_file()
    assert "left" in (checkpoint / "both" / "compare.md").read_text()
