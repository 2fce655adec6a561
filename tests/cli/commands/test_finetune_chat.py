"""hf-cod finetune on chats: the loss is on answers, the result has the chat template, and a killed run resumes."""

import json
import random
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_cod import LayerScores, RunReport, load_texts, perplexity
from hf_cod.cli.main import main
from hf_cod.io.answers import answers_of, rows_of
from hf_cod.io.models import embedded_model
from hf_cod.io.text import embedded_text
from tests.docs.pages import blocks, read
from tests.io.test_chat import MARKS
from tests.tiny_tokenizers import gpt_like
from tests.tiny_training import dies_in_step_five

QUICK = "--steps 10 --batch-size 4 --micro-batch-size 2 --sequence-length 64 --eval-samples 8 --save-every 2"
QUICK += (
    " --log-every 2 --dtype float32 --device cpu --no-plots --learning-rate 1e-3 --n-active 3 --interval 3 --rank 8"
)
MODEL = embedded_model("lns")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """Options for a file of 60 chats, two of them without an answer, and a template."""
    words, draw = embedded_text().split(), random.Random(0)

    def said(most):
        start = draw.randrange(len(words) - most)
        return " ".join(words[start : start + draw.randint(1, most)])

    rows = [
        [turn for _ in range(draw.randint(1, 2)) for turn in (("user", said(4)), ("assistant", said(9)))]
        for _ in range(60)
    ]
    rows[3], rows[5] = rows[3][:1], [("user", "Who?"), ("assistant", " ")]
    lines = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in rows]
    folder = tmp_path_factory.mktemp("chat")
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "chat.jinja").write_text(MARKS)
    return ["--text", str(folder / "chat.jsonl"), "--chat-template", str(folder / "chat.jinja")]


@pytest.fixture(scope="module")
def whole(chat, tmp_path_factory):
    """The output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(["finetune", MODEL, *chat, *QUICK.split(), "--output", str(output)]) == 0
    return output


def test_a_chat_is_learned_and_the_result_can_chat(whole, chat):
    report = RunReport.load(whole)
    found = report.results["perplexity"]
    assert found["after"] < found["before"]
    assert report.notes[0] == "the text was read as conversations (column messages)"
    assert report.notes[1] == "the loss is on answers alone; answers are those that the chat template marks"
    assert report.notes[2].startswith("2 of 60 records were left out: 2 without an answer")
    assert any(note.startswith("50 records were packed into ") for note in report.notes)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    assert tokenizer.chat_template == MARKS
    model = AutoModelForCausalLM.from_pretrained(whole)
    records = load_texts(text=chat[1], chat_template=chat[3])
    held_out = rows_of(answers_of(tokenizer, records, 64).samples[-8:], 64, False, tokenizer).batches(8, 4)
    assert perplexity(model, held_out) == pytest.approx(found["after"], rel=1e-4)


def commands_of_the_page(folder, model, answers):
    """Arguments of the page's three commands for a model of the test, in a folder with 40 chats."""
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in answers.items()
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) * (40 // len(lines)))
    section = read("docs/how-to/finetune.md").partition("## Chats")[2]
    (folder / "chat.jinja").write_text(blocks(section, "jinja")[0])
    found = [shlex.split(line) for line in blocks(section, "sh")[0].strip().splitlines()]
    return [[model if word == "Qwen/Qwen2.5-0.5B-Instruct" else word for word in line[1:]] for line in found]


def answer_in_a_fresh_process(ask):
    done = subprocess.run([sys.executable, *ask], capture_output=True, text=True, check=True)
    return done.stdout.strip()


ANSWERS = {"Who are you?": "I am Anne Elliot.", "Where is she?": "She is at Lyme."}


@pytest.mark.process
def test_the_commands_of_the_page_give_the_answer_of_the_file(mixture, tmp_path, monkeypatch):
    """A small stock model without a chat template learns two chats by heart."""
    monkeypatch.chdir(tmp_path)
    fits, train, ask = commands_of_the_page(tmp_path, mixture, ANSWERS)
    assert main(fits) == 0
    learn = "--method full --learning-rate 3e-3 --steps 40 --batch-size 4 --sequence-length 64 --eval-samples 4"
    learn += " --dtype float32 --device cpu --no-plots"
    assert main([*train, "--chat-template", "chat.jinja", *learn.split()]) == 0
    assert answer_in_a_fresh_process(ask) == str({"role": "assistant", "content": ANSWERS["Who are you?"]})
    answer = pipeline("text-generation", "tuned-chat")([{"role": "user", "content": "Where is she?"}])
    assert answer[0]["generated_text"][-1]["content"] == ANSWERS["Where is she?"]


@pytest.mark.process
def test_the_commands_of_the_page_teach_a_chat_model(smollm2, tmp_path, monkeypatch):
    """With the chat template of the model, which marks no answers."""
    monkeypatch.chdir(tmp_path)
    fits, train, ask = commands_of_the_page(tmp_path, smollm2, {"Who are you?": "I am Anne Elliot."})
    assert main([*fits, "--sequence-length", "64"]) == 0
    learn = "--method lora --learning-rate 1e-3 --steps 12 --batch-size 4 --sequence-length 64 --eval-samples 4"
    assert main([*train, *learn.split(), "--device", "cpu", "--no-plots"]) == 0
    assert answer_in_a_fresh_process(ask) == str({"role": "assistant", "content": "I am Anne Elliot."})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["owlore-peft", "lora", "lisa"])
def test_other_methods_learn_chats(method, chat, tmp_path):
    options = QUICK.replace("--rank 8", "") if method == "lisa" else QUICK
    options = options.partition("--n-active")[0] if method == "lora" else options
    assert (
        main(["finetune", MODEL, *chat, *options.split(), "--method", method, "--output", str(tmp_path / "out")]) == 0
    )
    found = RunReport.load(tmp_path / "out").results["perplexity"]
    assert found["after"] < found["before"]


@pytest.mark.process
def test_a_killed_run_on_packed_chats_ends_as_one_that_was_not(whole, chat, tmp_path, capsys):
    command = ["finetune", MODEL, *chat, *QUICK.split(), "--output"]
    dies_in_step_five([*command, str(tmp_path / "killed")])
    settings = tmp_path / "killed" / "settings.json"
    noted = json.loads(settings.read_text())
    settings.write_text(json.dumps({**noted, "answers_by": "prefixes"}))  # as without TRL, which was installed since
    assert main([*command, str(tmp_path / "killed")]) == 2
    assert "answers_by: expected 'prefixes', as in the run in " in capsys.readouterr().err
    assert noted.pop("answers_by") == "marks"
    settings.write_text(json.dumps(noted))  # as an earlier version wrote it
    assert main([*command, str(tmp_path / "killed")]) == 0
    weights, resumed = (load_file(run / "model.safetensors") for run in (whole, tmp_path / "killed"))
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.parametrize("method", ["owlore", "lisa", "lora", "full"])
def test_the_printed_script_trains_by_trl(method, checkpoint, capsys):
    """It runs as it is printed; only the CPU is asked for, as a GPU is not."""
    tokenizer = gpt_like()
    tokenizer.chat_template = MARKS
    tokenizer.save_pretrained(checkpoint / "model")
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (checkpoint / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    command = ["finetune", str(checkpoint / "model"), "--text", str(checkpoint / "chat.jsonl"), "--method", method]
    command += ["--steps", "1"]
    command += ["--batch-size", "2", "--sequence-length", "64", "--output", str(checkpoint / "out"), "--print-trl"]
    (checkpoint / "out").mkdir()
    LayerScores("m", "owl", [1.0] * 4, [7680] * 4).save(checkpoint / "out" / "scores.json")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "assistant_only_loss=True" in printed and len(printed.split("\n\n")[1].strip().splitlines()) == 3
    namespace = {}
    exec(printed.replace("bf16=False", "bf16=False, use_cpu=True, report_to=[]"), namespace)
    assert (checkpoint / "out" / "checkpoint-1" / "trainer_state.json").is_file()


def test_the_printed_script_leaves_no_option_out(chat, tmp_path, capsys):
    """It has them, or the command refuses them."""
    command = ["finetune", MODEL, *chat, "--print-trl", "--output", str(tmp_path / "out")]
    options = (
        "--scale 0.5 --moments 8bit --deselected keep --rounding nearest --exclude down_proj --n-active 2 --rank 8"
    )
    assert main([*command, *options.split(), "--dtype", "bfloat16", "--save-every", "20", "--log-every", "5"]) == 0
    printed = capsys.readouterr().out
    for word in (
        *("scale=0.5", "moments='8bit'", "deselected='keep'", "rounding='nearest'", "exclude=['down_proj']"),
        *("n_active=2", "rank=8", "{'dtype': 'bfloat16'}", "save_steps=20", "logging_steps=5"),
    ):
        assert word in printed
    for refused in (
        *("--eval-samples 8", "--passes 2", "--score fisher", "--device cpu"),
        *("--method lora --exclude down_proj", "--method full --include down_proj", "--method galore"),
    ):
        assert main([*command, *refused.split()]) == 2
        error = capsys.readouterr().err
        assert "print_trl" in error and error.count("\n") == 1


def test_without_a_template_one_line_says_how_to_name_one(chat, tmp_path, capsys):
    assert main(["finetune", MODEL, *chat[:2], *QUICK.split(), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("got one without; --chat-template FILE names one\n") and "Traceback" not in error


def test_a_column_of_completions_says_what_it_leaves_out(tmp_path, capsys):
    rows = [{"prompt": "Who?", "completion": embedded_text()[i * 400 : i * 400 + 400]} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "diagnose",
        MODEL,
        "--text",
        str(tmp_path / "pairs.jsonl"),
        "--metrics",
        "angular_distance",
        "--sequence-length",
    ]
    command += ["16", "--max-samples", "4", "--no-plots", "--output", str(tmp_path / "out")]
    assert main([*command, "--text-column", "completion"]) == 0
    note = "the text was read as plain text (column completion); not read: prompt"
    assert RunReport.load(tmp_path / "out").notes[0] == note and note in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["owlore", "owlore-peft", "galore"])
def test_defaults_fit_a_small_model(method, checkpoint, capsys):
    """4 layers of width 32: 5 layers and rank 128 are lowered, with a note."""
    command = ["finetune", str(checkpoint / "model"), "--text", str(checkpoint / "text.txt"), "--method", method]
    command += ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--eval-samples", "4", "--no-plots"]
    assert main([*command, "--output", str(checkpoint / "out")]) == 0
    said = capsys.readouterr().err
    assert "32 instead of the default 128: the width of the layers' matrices" in said
    assert ("n_active: 4 instead of the default 5" in said) == (method != "galore")
    if method == "owlore":
        assert main([*command, "--n-active", "5", "--output", str(checkpoint / "other")]) == 2
        assert "n_active: expected between 1 and the 4 layers of the scores, got 5" in capsys.readouterr().err
