"""reproduce.import_srflow: released checkpoints by their keys, on small files of the same keys.

The expected latents come from `released_files.reference`, which uses nothing of our flow.
"""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from released_files import of_rrdb, reference, reference_of_rrdb, released

from flows.srflow import SRFlow
from reproduce import evaluate, export, import_srflow, load, upscale
from reproduce.config import ConfigError
from reproduce.model import stored_model
from reproduce.pretrained_encoder import encoder_weights
from reproduce.released_srflow import parts_of, read_released, released_model
from reproduce.stored import read_stored
from results import runs

STACKED = (0, 2)
WORD = "stacked=[0,2]"
FILES = ["README.md", "config.yaml", "import.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def small_crops(monkeypatch):
    monkeypatch.setattr(import_srflow, "SIDE", 32)
    monkeypatch.setattr(import_srflow, "EXACT_SIDE", 16)


def saved(folder: Path, weights, name="SRFlow_tiny.pth", **options) -> Path:
    path = folder / name
    torch.save(weights, path, **options)
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder of an imported file, and the tensors of the file."""
    folder = tmp_path_factory.mktemp("imported")
    weights = released()
    path = saved(folder, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_srflow, "SIDE", 32)
        patch.setattr(import_srflow, "EXACT_SIDE", 16)
        import_srflow.main([str(path), f"out={folder / 'model'}", WORD])
    return folder / "model", weights


def mistake(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        import_srflow.main([str(word) for word in words])
    assert isinstance(stop.value.code, str), "exit code 0 for a mistake"
    assert "\n" not in stop.value.code
    assert "Traceback" not in capsys.readouterr().err
    return stop.value.code.removeprefix("error: ")


# ---------------------------------------------------------------------- the model


def test_an_imported_flow_computes_what_the_released_one_does(imported):
    folder, weights = imported
    flow = load(folder).flow.double()
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    low_res = torch.rand(2, 3, 4, 6, dtype=torch.float64)
    latents, log_det = flow(x, low_res)
    expected, expected_log_det = reference(weights, x, low_res, STACKED)
    for ours, theirs in zip(latents, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-12, atol=0)


def test_a_flow_of_eight_times_the_size_is_the_released_one(tmp_path):
    weights = released(scale=8, n_levels=4, depth=1)
    out = tmp_path / "model"
    import_srflow.main([str(saved(tmp_path, weights)), f"out={out}", WORD])
    model = load(out)
    assert model.experiment == "srflow_celeba_x8"
    x = torch.rand(1, 3, 16, 32, dtype=torch.float64)
    low_res = torch.rand(1, 3, 2, 4, dtype=torch.float64)
    latents, log_det = model.flow.double()(x, low_res)
    expected, expected_log_det = reference(weights, x, low_res, STACKED)
    assert [tuple(z.shape[1:]) for z in latents] == [(6, 8, 16), (12, 4, 8), (192, 1, 2)]
    for ours, theirs in zip(latents, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (lambda weights: weights, {"_use_new_zipfile_serialization": False}),
        (lambda weights: {f"module.{key}": value for key, value in weights.items()}, {}),
        (lambda weights: {key: value.double() for key, value in weights.items()}, {}),
        (lambda weights: {k: v for k, v in weights.items() if "HRconv" not in k}, {}),
    ],
    ids=["file of torch 1.5", "DataParallel", "float64", "without the head"],
)
def test_other_forms_of_a_file_hold_the_same_weights(tmp_path, imported, form, options):
    path = saved(tmp_path, form(imported[1]), **options)
    weights = read_released(path)
    stored = import_srflow.stored_of(path, weights, released_model(weights, path, STACKED))
    expected = load(imported[0]).stored.weights
    assert stored.weights.keys() == expected.keys()
    assert all(torch.equal(stored.weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("scale", [4, 8])
def test_an_imported_rrdb_is_the_released_one_and_starts_a_flow(tmp_path, capsys, scale):
    weights = released(scale=scale, n_levels=3 if scale == 4 else 4)
    path = saved(tmp_path, of_rrdb(weights), "RRDB_tiny.pth")
    out = tmp_path / "rrdb"
    import_srflow.main([str(path), f"out={out}"])
    assert f"flow.encoder_checkpoint={out}" in capsys.readouterr().out
    record = json.loads((out / "import.json").read_text())
    settings = {"scale": scale, "n_blocks": 3, "channels": 4, "growth": 3}
    assert record["settings"] == settings
    assert record["checks"].keys() == {"psnr", "lr_psnr"}
    stored = read_stored(out)
    model = stored_model(stored)
    assert model.experiment == {4: "rrdb_div2k_x4", 8: "rrdb_celeba_x8"}[scale]
    low_res = torch.rand(1, 3, 5, 7, dtype=torch.float64)
    expected = reference_of_rrdb(weights, low_res)
    torch.testing.assert_close(model.network.double()(low_res), expected, rtol=0, atol=1e-12)
    flow = saved(tmp_path, weights)
    of_flow = read_released(flow)
    whole = import_srflow.stored_of(flow, of_flow, released_model(of_flow, flow, STACKED))
    encoder = {key: value for key, value in whole.weights.items() if "context_encoder" in key}
    ours = encoder_weights(stored)
    assert ours.keys() == encoder.keys()
    assert all(torch.equal(ours[key], encoder[key]) for key in encoder)
    line = mistake(capsys, path, f"out={tmp_path / 'other'}", WORD)
    assert "is for a flow" in line


# The released sizes. The counts are those of the released configurations without the 352,163
# parameters that get no gradient. The shapes are in messages of torch: andreas128/SRFlow issue 14.
RELEASED = {
    "DF2K 4x": (SRFlow, {}, 16_697_987 + 22_843_824),
    "DF2K 8x": (SRFlow, {"scale": 8, "n_levels": 4, "stacked": (1, 3, 5, 7)}, 50_821_891),
    "CelebA 8x": (
        SRFlow,
        {"scale": 8, "n_levels": 4, "stacked": (1, 3, 5, 7), "encoder_blocks": 8},
        5_943_555 + 34_086_976,
    ),
}
SHAPES = {
    "DF2K 4x": {
        "flowUpsamplerNet.layers.50.affine.fFeatures.4.bias": (192,),
        "flowUpsamplerNet.layers.50.affine.fFeatures.4.logs": (192, 1, 1),
        "flowUpsamplerNet.layers.51.actnorm.bias": (1, 96, 1, 1),
        "flowUpsamplerNet.layers.51.actnorm.logs": (1, 96, 1, 1),
        "flowUpsamplerNet.layers.51.invconv.weight": (96, 96),
        "flowUpsamplerNet.layers.51.affine.fAffine.0.weight": (64, 368, 3, 3),
        "flowUpsamplerNet.layers.51.affine.fAffine.4.weight": (96, 64, 3, 3),
    },
    "DF2K 8x": {
        "flowUpsamplerNet.layers.39.conv.bias": (24,),
        "flowUpsamplerNet.layers.39.conv.logs": (24, 1, 1),
        "flowUpsamplerNet.layers.39.conv.weight": (24, 12, 3, 3),
        "flowUpsamplerNet.layers.50.affine.fFeatures.4.bias": (96,),
        "flowUpsamplerNet.layers.50.affine.fFeatures.4.logs": (96, 1, 1),
        "flowUpsamplerNet.layers.51.invconv.weight": (48, 48),
        "flowUpsamplerNet.layers.51.affine.fAffine.0.weight": (64, 344, 3, 3),
        "flowUpsamplerNet.layers.51.affine.fAffine.4.weight": (48, 64, 3, 3),
        "flowUpsamplerNet.layers.58.affine.fAffine.2.actnorm.logs": (1, 64, 1, 1),
    },
    "CelebA 8x": {"RRDB.RRDB_trunk.7.RDB3.conv5.weight": (64, 192, 3, 3)},
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_keys_at_the_released_sizes_are_those_of_the_release(name):
    kind, arguments, n_parameters = RELEASED[name]
    with torch.device("meta"):
        flow = kind(**arguments, permutation="invertible_plain")
    parts = list(parts_of(flow))
    assert sum(part.tensor.numel() for part in parts) == n_parameters - 352_163
    assert len({id(part.tensor) for part in parts}) == len(list(flow.parameters()))
    shapes = {part.key: part.shape for part in parts}
    assert {key: shapes.get(key) for key in SHAPES[name]} == SHAPES[name]
    layers = {int(key.split(".")[2]) for key in shapes if ".layers." in key}
    squeezes = {"DF2K 4x": {0, 20, 39}}.get(name, {0, 20, 40, 59})
    assert set(range(max(layers) + 1)) - layers == squeezes
    assert max(layers) + 1 == {"DF2K 4x": 58}.get(name, 78)


# ---------------------------------------------------------------------- the folder


def test_the_folder_records_what_was_imported_and_checked(imported, tmp_path, capsys):
    folder, weights = imported
    assert sorted(path.name for path in folder.iterdir()) == FILES
    record = json.loads((folder / "import.json").read_text())
    assert record["file"] == "SRFlow_tiny.pth"
    assert record["tensors"] == len(weights)
    assert record["settings"]["stacked"] == [0, 2]
    checks = record["checks"]
    assert checks["float32_error"] < 1e-4
    assert checks["float64_error"] < 1e-11
    assert checks["log_det_error"] < 1e-11
    model = load(folder)
    assert model.experiment == "srflow_div2k_x4"
    assert model.config.optim.noise == "none"
    assert model.config.flow.permutation == "invertible_plain"
    export.main([str(folder), f"out={tmp_path / 'again'}"])
    again = (tmp_path / "again" / "README.md").read_text()
    assert again.split("\n## ")[1:] == (folder / "README.md").read_text().split("\n## ")[1:]
    assert "CC BY-NC-SA" in again
    assert record["sha256"] in again
    assert "python -m reproduce.upscale" in again
    assert "## Training" not in again


def test_the_checks_are_of_the_flow_itself(imported):
    """Against the reference: bits a pixel of one crop, and the Jacobian's determinant."""
    folder, weights = imported
    flow = load(folder).flow
    image = import_srflow.crops(16)[:1]
    row = import_srflow._measured(flow, image, "error")
    x, low_res = import_srflow._inputs(flow, image)
    latents, log_det = reference(weights, x, low_res, STACKED)
    normal = torch.distributions.Normal(0.0, 1.0)
    log_prob = log_det + sum(normal.log_prob(z).sum() for z in latents)
    expected = -log_prob.item() / 256 / torch.tensor(2.0).log().item()
    assert row["release_bits"] == pytest.approx(expected, rel=1e-5)
    flow.double()
    assert import_srflow.jacobian_error(flow, import_srflow.middle(image, 8)) < 1e-12


def test_a_flow_that_cannot_be_inverted_is_refused(tmp_path, capsys):
    weights = released(depth=1)
    matrix = weights["flowUpsamplerNet.layers.2.invconv.weight"]
    matrix[0] = matrix[1]
    line = mistake(capsys, saved(tmp_path, weights), f"out={tmp_path / 'model'}", WORD)
    assert "invert" in line
    assert not (tmp_path / "model").exists()


def test_a_flow_that_float32_cannot_invert_is_imported_with_a_warning(tmp_path, capsys):
    weights = released(depth=1)
    matrix = weights["flowUpsamplerNet.layers.2.invconv.weight"]
    matrix[0] = 1e-7 * matrix[0] + matrix[1]  # two rows that are almost the same
    import_srflow.main([str(saved(tmp_path, weights)), f"out={tmp_path / 'model'}", WORD])
    assert "use model.flow.double()" in capsys.readouterr().out


def test_a_tested_import_is_a_row_and_every_command_takes_it(tmp_path, capsys):
    """The test is on two photographs of 24x32 pixels."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    path = saved(tmp_path, released(depth=1))
    out = tmp_path / "tiny"
    words = [f"data.test_root={photos}", f"data.cache={tmp_path / 'cache'}", "eval.samples=2"]
    words += ["eval.temperature=0.1", "metrics.lpips=[]"]
    import_srflow.main([str(path), f"out={out}", WORD, "device=cpu", *words])
    result = json.loads((out / "result.json").read_text())
    record = json.loads((out / "import.json").read_text())
    assert result["images"] == 0
    assert result["parameters"] == record["parameters"]
    assert result["config"]["imported"]["sha256"] == record["sha256"]
    assert result["metrics"]["test/psnr"] > 0
    addition = runs.add(out)
    assert addition.lines[0].startswith("recorded ")
    assert [file.name for file in addition.files] == ["tiny.safetensors", "tiny.json"]
    capsys.readouterr()
    evaluate.main(
        [str(out), "device=cpu", f"data.test_root={photos}", words[1], "metrics.lpips=[]"]
    )
    lines = capsys.readouterr().out.splitlines()
    equal = [line for line in lines if line.endswith(": equal to the last digit")]
    assert len(equal) == len([value for value in result["metrics"].values() if value is not None])
    upscale.main([str(out), str(photos / "0.png"), f"out={tmp_path / 'large'}", "strip=false"])
    sizes = {Image.open(file).size for file in (tmp_path / "large").rglob("*.png")}
    assert sizes == {(128, 96)}


# ---------------------------------------------------------------------- mistakes


def faults(weights):
    """Wrong files: what is in them, and the words of the message."""
    step = "flowUpsamplerNet.layers.4"
    key = f"{step}.affine.fAffine.2.actnorm.logs"
    without = {k: v for k, v in weights.items() if k != key}
    no_flow = {k: v for k, v in weights.items() if not k.startswith("flow")}
    no_step = {k: v for k, v in weights.items() if not k.startswith(f"{step}.")}
    no_first = {k: v for k, v in weights.items() if "conv_first" not in k}
    no_last = {k: v for k, v in of_rrdb(weights).items() if "HRconv" not in k}
    nan = weights[key].clone()
    nan[0] = torch.nan
    return {
        "missing": (without, f"lacks {key}"),
        "no step": (no_step, f"lacks {step}.actnorm.bias, "),
        "no flow": (no_flow, "lacks flowUpsamplerNet.layers.*.invconv.weight"),
        "no key": ({f"a{k}": v for k, v in weights.items()}, "lacks conv_first.weight, "),
        "rrdb": (no_last, "lacks HRconv.weight, HRconv.bias: "),
        "no encoder": (no_first, "lacks RRDB.conv_first.weight"),
        "unknown": (weights | {"RRDB.extra.weight": torch.zeros(2)}, "has RRDB.extra.weight, "),
        "shape": (weights | {key: torch.zeros(1, 6, 1, 1)}, f"{key} is (1, 6, 1, 1) and has to be"),
        "nan": (weights | {key: nan}, f"not finite, in {key}"),
        "integers": (weights | {key: torch.zeros(5).int()}, f"holds {key}, which are no weights"),
        "nested": ({"state_dict": weights}, "holds state_dict, which are no weights"),
        "a list": ([1, 2], "holds no tensors by their names"),
        "empty": ({}, "holds no tensors by their names"),
        "repeated": (
            weights | {key: torch.zeros(1).expand(10**9)},
            "holds more values than it has bytes for",
        ),
    }


@pytest.mark.parametrize("name", faults(released()))
def test_a_wrong_file_is_one_line_that_names_the_fault(name, imported, tmp_path, capsys):
    content, words = faults(imported[1])[name]
    path = saved(tmp_path, content)
    options = [] if name in ("no key", "rrdb") else [WORD]
    line = mistake(capsys, path, f"out={tmp_path / 'model'}", *options)
    assert words in line
    assert str(path) in line
    assert not (tmp_path / "model").exists()


def test_a_damaged_or_cut_file_is_one_line(imported, tmp_path, capsys):
    path = saved(tmp_path, imported[1])
    content = path.read_bytes()
    name = tmp_path / "wrong.pth"
    middle = len(content) // 2
    damaged = {
        content[:middle]: "is damaged or cut off",
        content[:middle] + bytes([255 - content[middle]]) + content[middle + 1 :]: "is damaged",
        b"<!DOCTYPE html><html>not found</html>": "is no file of weights",
        b"": "is damaged",
    }
    for bad, words in damaged.items():
        name.write_bytes(bad)
        assert words in mistake(capsys, name, f"out={tmp_path / 'model'}", WORD)
    legacy = saved(tmp_path, imported[1], "old.pth", _use_new_zipfile_serialization=False)
    name.write_bytes(legacy.read_bytes()[:-1000])
    assert "is damaged" in mistake(capsys, name, f"out={tmp_path / 'model'}", WORD)
    assert "no file" in mistake(capsys, tmp_path / "none.pth", f"out={tmp_path / 'model'}")
    assert "is a folder" in mistake(capsys, tmp_path, f"out={tmp_path / 'model'}")


class Planted:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_archive", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, capsys, is_archive):
    trace = tmp_path / "trace"
    content = {"RRDB.conv_first.weight": Planted(trace)}
    path = tmp_path / "planted.pth"
    if is_archive:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    line = mistake(capsys, path, f"out={tmp_path / 'model'}")
    assert "asks to run code" in line
    assert not trace.exists()


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path, imported):
    path = saved(tmp_path, imported[1])
    packed = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ConfigError, match="is damaged"):
        read_released(packed)


def test_nothing_is_overwritten(imported, tmp_path, capsys):
    path = saved(tmp_path, imported[1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "holds files already" in mistake(capsys, path, f"out={tmp_path / 'full'}", WORD)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]
    assert "is no folder" in mistake(capsys, path, f"out={path}", WORD)
    assert "out= is missing" in mistake(capsys, path)
    assert "FILE is missing" in mistake(capsys, f"out={tmp_path / 'new'}")


def test_the_stacked_blocks_have_to_fit_the_file(imported, tmp_path, capsys):
    path = saved(tmp_path, imported[1])
    out = f"out={tmp_path / 'model'}"
    line = mistake(capsys, path, out)  # the released four
    assert "give the numbers of 2 blocks as stacked=, not [1, 8, 15, 22]" in line
    assert "names blocks that the encoder lacks" in mistake(capsys, path, out, "stacked=[0,3]")
    assert "give the numbers of blocks" in mistake(capsys, path, out, "stacked=[first]")
    assert not (tmp_path / "model").exists()
