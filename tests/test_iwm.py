"""iwm.py against the numbers of its specification (tests/golden/iwm) and its own promises.

There is no official code. What it shares with ijepa.py byte for byte is tested there; what all
scripts promise, in test_runs.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import log_rows
from PIL import Image
from test_runs import SCRIPTS, here, learn, photographs, run_several, weights

import common
import ijepa
import iwm
from iwm import Config

GOLDEN = Path(__file__).parent / "golden" / "iwm"
TINY = {"image_size": 24, "patch": 4, "width": 16, "depth": 2, "heads": 2}
TINY.update(predictor_width=12, predictor_depth=3)


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float64):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected), atol=atol, rtol=rtol)


def tiny(conditioning="feature", dtype=torch.float32):
    """Return (model, target) with the weights of the tiny checkpoint; its predictor has 3 heads."""
    model, target = iwm.build(Config(**TINY, conditioning=conditioning))
    model.predictor = iwm.Predictor(6, 16, 12, 3, 3, conditioning)
    path = GOLDEN / "tiny_iwm.pt"
    iwm.load_weights(model, target, iwm.read_weights(path, heads=2), path)
    return model.to(dtype), target.to(dtype)


def inputs(dtype):
    """Return (golden file, source patches, target images, visible, hidden, action)."""
    g = golden("forward")
    visible, hidden = (tensor(g[name], torch.long) for name in ("keep", "mask"))
    x, y, action = (tensor(g[name], dtype) for name in ("x", "y", "action"))
    return g, common.patchify(x, 4), y, visible, hidden, action


# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("conditioning", ["feature", "sequence", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward(conditioning, dtype):
    g, patches, y, visible, hidden, action = inputs(dtype)
    model, target = tiny(conditioning, dtype)
    close(model.encoder(patches, keep=visible), g["z_x"], atol=1e-5)
    tokens = target(y)
    close(tokens, g["z_y"], atol=1e-5)
    predictions = model(patches, visible, hidden, action)
    close(predictions, g[f"pred_{conditioning}"], atol=1e-5)
    if conditioning == "feature":
        null = torch.zeros(2, 7, dtype=dtype)
        close(model.predictor.everywhere(tokens, null), g["ft_tokens"], atol=1e-5)
        close(iwm.iwm_loss(predictions, tokens, hidden), g["loss_l2_mean_ln"], rtol=1e-5)
        wanted = common.gather_tokens(tokens, hidden)  # losses that others use
        error = (predictions - wanted).square()
        close(error.sum() / 2, g["loss_l2_sum"], rtol=1e-5)
        close(error.mean(), g["loss_l2_mean"], rtol=1e-5)
        smooth = F.smooth_l1_loss(predictions, iwm.norm(wanted).to(dtype))
        close(smooth, g["loss_smoothl1_ln"], rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_gradients_along_given_directions(dtype, tolerance):
    """The loss works in float32: its formula in float64, and the loss itself beside it."""
    g, patches, y, visible, hidden, action = inputs(dtype)
    for kind in ("l2_sum", "l2_mean_ln"):
        model, target = tiny(dtype=dtype)
        predictions = model(patches, visible, hidden, action)
        tokens = target(y).detach()
        wanted = common.gather_tokens(tokens, hidden)
        loss = (predictions - wanted).square().sum() / 2
        if kind == "l2_mean_ln":
            loss = (predictions - F.layer_norm(wanted, wanted.shape[-1:])).square().mean()
            if dtype == torch.float32:
                loss = iwm.iwm_loss(predictions, tokens, hidden)
        loss.backward()
        parts = {"pr": model.predictor, "enc": model.encoder}
        keys = [key for key in g.files if key.startswith("dir:")]
        assert len(keys) == 8
        for key in keys:
            _, part, name = key.split(":")
            gradient = dict(parts[part].named_parameters())[name].grad.double()
            direction = tensor(g[key])
            scale = gradient.norm().item() * direction.norm().item()  # what cancels in the sum
            expected = float(g[f"dd_{kind}:{part}:{name}"])
            found = (gradient * direction).sum().item()
            assert found == pytest.approx(expected, rel=tolerance, abs=1e-6 * scale)


def test_actions():
    g = golden("actions")
    parts = (tensor(g[name]) for name in ("source_jitter", "target_jitter", "flags"))
    close(iwm.make_action(*parts), g["action"], atol=1e-12)


def test_photometric_operations():
    g = golden("photometric")
    image = tensor(g["image"], torch.float32)[None]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        theta = torch.tensor([iwm.NEUTRAL])
        theta[0, i] = float(g["factors"][i])
        close(iwm.jitter(image, theta)[0], g[name], atol=1e-5)
    theta = tensor(g["factors"], torch.float32)[None]
    close(iwm.jitter(image, theta)[0], g["chain_bcsh"], atol=1e-5)
    close(iwm.luma(image)[0].expand(3, -1, -1), g["grayscale"], atol=1e-5)
    close(iwm.solarize(image)[0], g["solarize"], atol=1e-5)
    neutral = torch.tensor([iwm.NEUTRAL])
    torch.testing.assert_close(iwm.jitter(image, neutral), image, atol=1e-6, rtol=0)


def test_blur_is_a_gaussian_with_reflected_borders():
    image = torch.rand(2, 3, 15, 20, generator=torch.Generator().manual_seed(0)).double()
    sigma = torch.tensor([0.4, 1.5]).double()
    padded = F.pad(image, (5, 5, 5, 5), mode="reflect")
    line = torch.arange(-5, 6).double()
    for i in range(2):
        kernel = torch.exp(-(line**2) / (2 * sigma[i] ** 2))
        kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
        expected = F.conv2d(padded[i][:, None], kernel[None, None])[:, 0]
        torch.testing.assert_close(iwm.blur(image, sigma, 5)[i], expected)


def test_mrr():
    g = golden("mrr")
    predictions, bank = tensor(g["pred"]), tensor(g["bank"])
    true = tensor(g["target"], torch.long)

    def distances():
        pairs = zip(predictions, bank, strict=True)
        return torch.cat([iwm.squared_distances(p[None], b) for p, b in pairs])

    close(distances(), g["dist2"], rtol=1e-9)
    found = iwm.ranks(distances(), true)
    np.testing.assert_array_equal(found, g["rank"])
    close((1 / found.double()).mean(), g["mrr"], rtol=1e-12)
    cosine = 1 - F.cosine_similarity(predictions[:, None].flatten(2), bank.flatten(2), dim=-1)
    np.testing.assert_array_equal(iwm.ranks(cosine, true), g["rank_cosine"])
    close((1 / iwm.ranks(cosine, true).double()).mean(), g["mrr_cosine"], rtol=1e-12)
    bank[0, (true[0] + 1) % 16] = bank[0, true[0]]
    np.testing.assert_array_equal(iwm.ranks(distances(), true), g["tie_rank"])
    assert iwm.ranks(torch.tensor([[0.9, 0.2, 0.5, 0.2]]), torch.tensor([2])).tolist() == [3]
    assert sum(1 / k for k in range(1, 257)) / 256 == pytest.approx(float(g["chance256"]))


def test_masks_have_the_golden_statistics():
    """Of unions of blocks that do not touch the last row and column, as the golden ones."""
    g = golden("masks")
    sizes = [
        iwm.block_size((i + 0.5) / 20000, 14, (0.15, 0.2), (0.75, 1.5), 13) for i in range(20000)
    ]
    found, counts = np.unique(sizes, axis=0, return_counts=True)
    expected = dict(zip(map(tuple, g["block_sizes"].tolist()), g["block_probs"], strict=True))
    assert {tuple(size) for size in found.tolist()} == set(expected)
    for size, count in zip(found.tolist(), counts, strict=True):
        assert abs(count / 20000 - expected[tuple(size)]) < 0.02
    random = torch.Generator().manual_seed(0)
    unions = []
    for size in sizes[::20]:
        uniform = torch.rand(20, 4, 2, generator=random, dtype=torch.float64)
        unions.append(iwm.hidden_patches(uniform, size, 14, border=0))
    hidden = torch.cat(unions)
    counts = hidden.sum(1)
    assert abs(counts.double().mean() - float(g["union_mean"])) < 0.01 * 196
    assert abs(counts.double().std() - float(g["union_std"])) < 0.01 * 196
    assert (hidden.double().mean(0).view(14, 14) - tensor(g["mask_freq"])).abs().max() < 0.03
    histogram = counts.bincount(minlength=197).double() / len(hidden)
    expected = tensor(g["union_hist"]).cumsum(0) / g["union_hist"].sum()
    assert (histogram.cumsum(0) - expected).abs().max() < 0.05


SIZES = {  # the paper's: predictor depth and width, encoder parameters with their positions
    "vit_b16_equivariant_in1k": (18, 384, 768, 85_797_120),
    "vit_b16_invariant_in1k": (12, 384, 768, 85_797_120),
    "vit_l16_equivariant_in1k": (36, 512, 1024, 303_299_584),
}


@pytest.mark.parametrize("name", SIZES)
def test_paper_presets_have_the_papers_sizes(name):
    config, _ = common.parse_config(Config, iwm.PRESETS, iwm.DATA_PRESETS, ["--preset", name])
    with torch.device("meta"):
        model = iwm.IWM(config)
    depth, p, width, encoder = SIZES[name]
    predictor = depth * (12 * p**2 + 13 * p) + 2 * p * width + p + width  # blocks, in, out
    predictor += p + 196 * p + (3 * p + 7) * p + 3 * p + 2 * p  # token, positions, action, norm
    sizes = [sum(q.numel() for q in m.parameters()) for m in (model.encoder, model.predictor)]
    assert sizes == [encoder, predictor]


# ------------------------------------------------------------------------------------------ views


def pair(images, config, number=0):
    """Return the two views of images in 0..1, as pixels in 0..1, the action, and the parameters."""
    views = iwm.draw_views(len(images), config, common.generator(number))
    *views_of, action = iwm.make_pair(images, views, config)
    return *(x * common.STD + common.MEAN for x in views_of), action, views


def test_views_differ_only_in_what_the_action_says():
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    off = Config(jitter_share=0.0, grey=0.0, blur=0.0, solarize=0.0)
    x, y, action, _ = pair(images, off)
    assert torch.equal(x, y) and not action.any()
    torch.testing.assert_close(y, images, atol=1e-5, rtol=0)
    x, y, action, _ = pair(images, replace(off, grey=1.0))
    assert x.std(1).max() < 1e-3 < y.std(1).max() and action[:, 4].all() and action.sum() == 8
    x, y, action, views = pair(images, replace(off, jitter_share=1.0), 3)
    torch.testing.assert_close(views[0] + action[:, :4], views[1])
    torch.testing.assert_close(y, iwm.jitter(images, views[1]), atol=1e-5, rtol=0)
    x, y, _, views = pair(images, replace(off, blur=0.5))
    assert 0 < len(views[3]) < 8
    changed = (x != y).flatten(1).any(1).nonzero()[:, 0]
    assert torch.equal(changed, views[3])


def test_draws_follow_the_settings():
    config = Config(jitter=(0.4, 0.3, 0.2, 0.1))
    views = iwm.draw_views(4000, config, common.generator(5))
    neutral = torch.tensor(iwm.NEUTRAL)
    for theta in views[:2]:
        applied = (theta != neutral).any(1)
        assert abs(applied.float().mean() - 0.8) < 0.03
        spread = (theta[applied] - neutral).abs()
        assert (spread.amax(0) <= torch.tensor(config.jitter) + 1e-6).all()
        torch.testing.assert_close(
            spread.mean(0), torch.tensor(config.jitter) / 2, rtol=0.05, atol=0
        )
    together = (views[0][:, 0] - 1).dot(views[1][:, 0] - 1).abs() / 4000
    assert together < 0.004, "drawn together"
    share = torch.tensor([0.2, 0.2, 0.1])
    torch.testing.assert_close(views[2].mean(0), share, atol=0.025, rtol=0)
    assert ((0.1 <= views[4]) & (views[4] <= 1.0)).all() and len(views[3]) == views[2][:, 1].sum()


def test_masks():
    config = Config(batch=128, micro=64, image_size=32, patch=4, seed=3)
    visible, hidden = iwm.sample_masks(config, 7)
    assert (visible.diff(dim=1) > 0).all() and (hidden.diff(dim=1) > 0).all()
    seen = torch.zeros(64, 64, dtype=torch.bool).scatter(1, visible, True)
    assert not seen.gather(1, hidden).any() and visible.shape[1] >= 8
    again = iwm.sample_masks(config, 7)
    assert torch.equal(again[0], visible) and torch.equal(again[1], hidden)
    other = iwm.sample_masks(replace(config, seed=4), 7)[1]
    assert not torch.equal(other[:, :3], hidden[:, :3])
    cover = torch.zeros(64)
    for number in range(60):
        cover += iwm.sample_masks(config, number)[1].flatten().bincount(minlength=64)
    cover = (cover / cover.sum()).view(8, 8)
    assert cover[-1].min() > 0, "masks reach the border"
    assert abs(cover[:4].sum() - 0.5) < 0.03, "the cut favours the top or the bottom"


# ---------------------------------------------------------------------------------------- weights


def test_i_jepa_checkpoints_are_an_unconditioned_start():
    """Official and ijepa.py's own: the same predictions as I-JEPA's predictor makes of a block."""
    g = np.load(GOLDEN.parent / "ijepa" / "forward.npz")
    path = GOLDEN.parent / "ijepa" / "tiny_ijepa.pth.tar"
    loaded = iwm.read_weights(path, heads=2)
    config = Config(**loaded["fields"], conditioning="none")
    assert (config.width, config.predictor_depth) == (12, 2)
    model, target = iwm.build(config)
    iwm.load_weights(model, target, loaded, path)
    patches = common.patchify(tensor(g["imgs_q"], torch.float32) / 16, 4)
    context = tensor(g["masks_enc"], torch.long)[0]
    blocks = [
        model(patches, context, block, torch.rand(len(patches), 7))
        for block in tensor(g["masks_pred"], torch.long)
    ]
    close(torch.cat(blocks), g["pred_out"], atol=1e-5)
    flags = "--steps 1 --eval none --lr 0 --lr-start 0 --lr-final 0 --out"
    here(SCRIPTS["ijepa"], SCRIPTS["ijepa"].small, flags, "start")
    small = SCRIPTS["iwm"].small
    here(SCRIPTS["iwm"], small, flags, "conditioned --init start/last.pt")
    start, state = weights("start")[1], weights("conditioned")[1]
    assert torch.equal(state["model.predictor.mask_token"], start["model.predictor.mask_token"])
    assert "model.predictor.cond.0.weight" in state
    fields = iwm.read_weights("conditioned/last.pt")["fields"]
    assert fields["conditioning"] == "feature" and ijepa.read_weights("start/last.pt")


# ------------------------------------------------------------------------------------- evaluation


def test_ranking_finds_a_perfect_world_model():
    """A model that returns the transformed latent has MRR 1; told another's action, chance."""
    config = Config(mrr_bank=32, image_size=16, patch=4)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))

    class Perfect:
        """Pixels as latents, so that it can do to them what the action says."""

        def __init__(self):
            self.encoder = lambda images: common.patchify(images, 4)
            self.predictor = self

        def everywhere(self, tokens, action):
            theta = action[:, :4] + torch.tensor(iwm.NEUTRAL)
            versions = iwm.jitter(image.expand(len(action), -1, -1, -1), theta)
            return self.encoder(common.normalize(255 * versions))

    perfect = Perfect()
    random = torch.Generator().manual_seed(0)
    versions, true, found = iwm.rank_transformations(
        perfect, perfect.encoder, image, config, random
    )
    assert found.shape == (3, 8, 32) and versions.shape == (32, 3, 16, 16)
    assert iwm.ranks(found[0], true).eq(1).all()
    assert (1 / iwm.ranks(found[1], true)).mean() < 0.5


def test_mosaics_and_their_labels():
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(-1, 3, 24, 24)
    tiles = iwm.mosaic(images, 8)
    assert tiles[0, 0, 0].tolist() == [0.0] * 8 + [1.0] * 16
    assert iwm.left_half(3, "cpu").tolist() == [True, False, False] * 3


def test_tuning_leaves_the_encoder_frozen_and_learns():
    """Head, predictor or all; two tasks with one predictor: is an image light, which half is."""
    config = Config(image_size=16, patch=8, width=16, depth=1, heads=2, predictor_width=16)
    config = replace(config, predictor_depth=1, init_std=0.2, patch_std=0.2, out="tuned")
    config = replace(config, tune_epochs=12, tune_batch=32, tune_lr=1e-2)
    labels = torch.arange(128) % 2
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 100, (128, 16, 16, 3), generator=random)
    pixels = (labels[:, None, None, None] * 100 + noise).byte().numpy()
    split = common.in_memory(pixels, labels.tolist(), ["dark", "light"], "train")
    world = common.World()
    run = common.Run(config, world)
    rest = (split, split, config, world, run)
    model, target = iwm.build(config)
    before = [p.clone() for p in target.parameters()]
    settings = ((None, False), (model.predictor, False), (model.predictor, True))
    for predictor, all_of_it in settings:
        found = iwm.tune(target, predictor, ["class"], *rest, all_of_it=all_of_it, fresh=True)
        assert found["class"] > 90
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    rest = (split, split, replace(config, tune_epochs=40), world, run)
    both = iwm.tune(target, model.predictor, ["class", "segment"], *rest, fresh=True)
    assert min(both.values()) > 75, "one predictor, two tasks"


def test_all_evaluations_on_one_rank_and_on_two(tmp_path, monkeypatch):
    data = photographs(tmp_path / "photos", count=25)
    flags = f"{SCRIPTS['iwm'].folder} --data {data} --steps 1 --probe-epochs 1 --tune-epochs 0.1"
    flags += " --mrr-images 3 --mrr-bank 16 --tune-batch 16"
    everything = "--eval knn,linear,attentive,mrr,finetune,segment,multitask,features --out one"
    here(SCRIPTS["iwm"], flags, everything)
    run_several(f"iwm {flags} --eval knn,linear,attentive,mrr,features --out two", ranks=2)
    one, two = (log_rows(name)[-1]["eval"]["trained"] for name in ("one", "two"))
    expected = {"knn", "linear", "attentive", "mrr", "mrr rolled", "mrr none", "mrr chance"}
    assert expected <= two.keys()
    ways = ("encoder", "random predictor", "predictor", "both", "with the other")
    expected |= {f"{task}: {way}" for task in ("class", "segment") for way in ways}
    assert expected == one.keys() and all(0 <= value <= 100 for value in one.values())
    assert one["mrr chance"] == pytest.approx(100 * sum(1 / k for k in range(1, 17)) / 16)
    assert two["mrr"] == pytest.approx(one["mrr"], abs=0.1)
    for key in ("knn", "linear"):
        assert two[key] == pytest.approx(one[key], abs=9)  # two of 25 images
    report = next(row for row in log_rows("one") if "action_ratio" in row)
    assert report["action_ratio"] > 0 and Image.open("one/picture.png").size[0] > 1000
    assert np.load("two/features.npz")["features"].shape == (25, 16)


@pytest.mark.parametrize("conditioning", ["none", "sequence"])
def test_other_conditionings_train(conditioning):
    here(SCRIPTS["iwm"], SCRIPTS["iwm"].small, f"--steps 2 --conditioning {conditioning} --out run")
    ratio = next(row["action_ratio"] for row in log_rows("run") if "action_ratio" in row)
    assert (ratio == 1) == (conditioning == "none")


def test_iwm_learns():
    """The predictor uses the action, and finds the transformed view among others."""
    flags = "--steps 120 --batch 48 --micro 48 --mrr-images 16 --eval mrr"
    rows = learn(SCRIPTS["iwm"], flags)
    found = next(row for row in rows if "action_ratio" in row)
    results = rows[-1]["eval"]["trained"]
    last = [row for row in rows if "feature_std" in row][-1]
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"
    assert found["action_ratio"] > 1.1 and found["content_ratio"] > 1.0
    assert results["mrr"] > 1.3 * results["mrr rolled"]
