"""Commands on the tiny model of `checkpoint` (conftest.py), and its text."""

from hf_cod.cli.main import main

TEXT = "one two three four five six seven eight nine ten " * 40
QUICK = ["--sequence-length", "8", "--max-samples", "4", "--batch-size", "2"]


def diagnose(folder, *more):
    return main(
        [
            "diagnose",
            str(folder / "model"),
            "--text",
            str(folder / "text.txt"),
            "--output",
            str(folder / "run"),
            *QUICK,
            *more,
        ]
    )


def prune(folder, output, *more):
    arguments = ["prune", str(folder / "model"), "--text", str(folder / "text.txt"), "--output", str(folder / output)]
    return main([*arguments, *QUICK, *more])


def factorize(folder, output, *more):
    arguments = ["factorize", str(folder / "model"), "--text", str(folder / "text.txt")]
    return main([*arguments, "--output", str(folder / output), *QUICK, *more])


def narrow(folder, output, *more):
    arguments = ["narrow", str(folder / "model"), "--text", str(folder / "text.txt"), "--channel-multiple", "8"]
    return main([*arguments, *QUICK, "--output", str(folder / output), *more])
