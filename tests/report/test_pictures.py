"""The pictures of a model and of a run: what is in them, and where they are written."""

import re
import resource
import sys
from xml.etree import ElementTree

import pytest
import torch
from families import question_batch, tiny_model, zero_uneven
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainingArguments

from hf_oto import OTOConfig, OTOTrainer, compress, plot_run, summarize
from hf_oto.report.card import card_section, figures
from hf_oto.report.milestones import PICTURE, Size, sizes_picture
from hf_oto.report.pictures import STAGES, run_figure, save_figure, stage_spans

HEADS = (3, 0, 2)  # what `zero_uneven` leaves of three blocks of 4


def zeroed(name):
    model = tiny_model(name)
    zero_uneven(model)
    return model


BLUE, GREY = (43, 108, 176), (221,) * 3


def pixels(path):
    return torch.tensor(imread(path)[..., :3]).mul(255).round().int()


def shares(path):
    """The shares of pixels in the colours of what is kept and of what is removed."""
    return [float((pixels(path) == torch.tensor(colour)).all(-1).float().mean()) for colour in (BLUE, GREY)]


def test_plot_draws_what_is_kept(tmp_path):
    dense, pruned = tmp_path / "new" / "dense.png", tmp_path / "pruned.PNG"
    summarize(tiny_model("RobertaModel")).plot(dense)
    summarize(zeroed("RobertaModel")).plot(str(pruned))
    assert pruned.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    kept, removed = shares(dense)
    assert kept > 0.4 and removed < 0.01  # the legend's
    share, removed = shares(pruned)
    # Half of the picture is heads, half is neurons: 5 of 12 and 28 of 72 are left. Both pictures have the same layout
    # but for the white between cells, rounded pixels at the bars' edges and the legend.
    assert share / kept == pytest.approx((5 / 12 + 28 / 72) / 2, abs=0.02)
    assert removed == pytest.approx(kept - share, abs=0.02)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["pruned.PNG", "dense.png"]


@pytest.mark.parametrize("cut", [False, True])
def test_the_grid_shows_which_heads_or_else_how_many(cut, tmp_path):
    model = zeroed("BertModel")
    summary = summarize(model)
    which = summary.kept_heads
    if cut:
        summary, which = summarize(compress(model)), [range(count) for count in HEADS]
    figure = summary.figure()
    grid = figure.axes[0]
    save_figure(figure, tmp_path / "layers.png")
    picture = pixels(tmp_path / "layers.png")
    for layer in range(3):
        for head in range(4):
            x, y = grid.transData.transform((layer, head)) * 120 / figure.dpi  # the file has 120 dots per inch
            colour = tuple(picture[picture.shape[0] - 1 - int(y), int(x)].tolist())
            assert colour == (BLUE if head in which[layer] else GREY)
    assert grid.get_ylabel() == ("heads (how many)" if cut else "head")


LOG = [
    {"step": 10, "loss": 3.0, "removed_params": 0.0, "removed_macs": 0.0, "stage": "warmup"},
    {"step": 20, "loss": 2.0, "removed_params": 0.2, "removed_macs": 0.1, "stage": "pruning"},
    {"step": 20, "eval_loss": 2.5},
    {"step": 30, "loss": 1.5, "removed_params": 0.5, "removed_macs": 0.4, "stage": "pruning"},
    {"step": 40, "loss": 1.0, "removed_params": 0.5, "removed_macs": 0.4, "stage": "recovery"},
    {"step": 45, "train_runtime": 1.0, "train_loss": 1.9},
]


def test_the_picture_of_a_run_has_its_loss_removed_shares_and_stages(tmp_path):
    losses, shares = run_figure(LOG).axes
    lines = {line.get_label(): line.get_xydata().tolist() for axes in (losses, shares) for line in axes.get_lines()}
    assert lines == {
        "training": [[10, 3], [20, 2], [30, 1.5], [40, 1]],
        "evaluation": [[20, 2.5]],
        "weights": [[10, 0], [20, 20], [30, 50], [40, 50]],
        "multiply-accumulates": [[10, 0], [20, 10], [30, 40], [40, 40]],
    }
    assert [(text.get_text(), text.get_position()[0]) for text in losses.texts] == [
        ("warmup", 10),
        ("pruning", 30),
        ("recovery", 42.5),
    ]
    assert stage_spans(LOG) == [("warmup", 0, 20), ("pruning", 20, 40), ("recovery", 40, 45)]
    # In grey as well: no two lines of a panel look the same, and the stages differ in brightness.
    for axes in (losses, shares):
        assert len({line.get_linestyle() for line in axes.get_lines()}) == 2
    brightness = sorted(int(colour[1:3], 16) for colour in {STAGES[stage] for stage in STAGES})
    assert min(b - a for a, b in zip(brightness, brightness[1:], strict=False)) >= 10
    plot_run(LOG, tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    plot_run(LOG, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == text
    with pytest.raises(ValueError, match="no entry with `loss` and `removed_params`"):
        plot_run([{"step": 1, "loss": 2.0}], tmp_path / "none.png")


def test_a_plot_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "kept.png"
    path.write_bytes(b"the last one")
    summary = summarize(tiny_model("BertModel"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the picture has more
    try:
        with pytest.raises(OSError, match="File too large"):
            summary.plot(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"the last one" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "kept.png").symlink_to("real.png")
    summarize(tiny_model("BertModel")).plot(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").is_symlink() and (tmp_path / "real.png").is_file()


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    summary = summarize(tiny_model("BertModel"))
    for name in ("kept.jpg", "kept"):
        with pytest.raises(ValueError, match=r"`path` must end in \.png or \.svg, got .*kept"):
            summary.plot(tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf-oto\[plot\]"):
        summary.plot(tmp_path / "kept.png")
    assert figures(summary, LOG) == {}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["eval_$^$", "eval_$\\frac$", "eval_a|b"])
def test_a_metric_may_have_any_name(name, tmp_path):
    sizes = [Size(share, 7, 1 - share, 1 - share, None, 10, {name: share}) for share in (0.3, 0.5)]
    save_figure(sizes_picture(sizes, None)[PICTURE], tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").is_file()
    summary = summarize(tiny_model("BertModel"))
    card = card_section(summary, repo_id="me/it", scores={name: 0.5}, dense_scores={name: 0.6}, sizes=sizes)
    for text in ("this model |", "| removed", "| 0.6 |"):
        (line,) = (line for line in card.splitlines() if text in line)
        columns = {"this model |": 3, "| removed": 6, "| 0.6 |": 3}[text]
        assert len(re.findall(r"(?<!\\)\|", line)) == columns + 1


def trainer_in(folder, **arguments):
    model = tiny_model("BertForQuestionAnswering")
    rows = question_batch(model, size=16)
    data = [{name: values[row] for name, values in rows.items()} for row in range(16)]
    arguments = {"max_steps": 20, "save_strategy": "no", "report_to": "none", "disable_tqdm": True} | arguments
    args = TrainingArguments(folder, use_cpu=True, per_device_train_batch_size=4, logging_steps=2, **arguments)
    config = OTOConfig(target_sparsity=0.5, pruning_periods=3, min_neurons=0, round_to=1)
    return OTOTrainer(model=model, args=args, oto_config=config, train_dataset=data)


def test_the_saved_model_comes_with_pictures_of_itself_and_of_the_run(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path / "out")
    trainer.train()
    trainer.save_model(tmp_path / "small")
    names = {f"{name}.{form}" for name in ("layers", "run") for form in ("png", "svg")}
    assert {path.name for path in (tmp_path / "small").glob("*.[ps][nv]g")} == names
    expected = tmp_path / "expected"
    summarize(trainer.model).plot(expected / "layers.svg")  # which heads it kept, not only how many
    plot_run(trainer.state.log_history, expected / "run.svg")
    for path in expected.iterdir():
        assert (tmp_path / "small" / path.name).read_bytes() == path.read_bytes()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer.save_model(tmp_path / "bare")
    files = {path.name for path in (tmp_path / "bare").iterdir()}
    assert files == {path.name for path in (tmp_path / "small").iterdir()} - names


def test_tensorboard_gets_the_pictures_of_every_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer_in(tmp_path / "out", report_to="tensorboard").train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    # Warm-up ends after 3 steps, pruning after 12, and every second step is logged.
    assert {name: [one.step for one in board.Images(name)] for name in board.Tags()["images"]} == {
        "layers": [4, 12, 20],
        "run": [4, 12, 20],
    }
    assert board.Images("run")[0].encoded_image_string[:4] == b"\x89PNG"
    assert "train/removed_params" in board.Tags()["scalars"]


def test_training_without_matplotlib_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer_in(tmp_path / "out", report_to="tensorboard").train()
    assert EventAccumulator(str(tmp_path / "board")).Reload().Tags()["images"] == []
