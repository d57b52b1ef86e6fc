"""iwm.py against the numbers of its specification (golden/iwm), and its own promises.

There is no official code. What it shares with ijepa.py byte for byte is tested there; what all
scripts promise, in test_runs.py.
"""

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, compare, count, golden_tensors, log_rows
from test_runs import SCRIPTS, here, learn, refused, weights

import common
import iwm
from iwm import Config

SCRIPT = SCRIPTS["iwm"]
run = functools.partial(here, SCRIPT)
golden = functools.partial(golden_tensors, "iwm")
TINY = GOLDEN / "iwm" / "tiny_iwm.pt"
ALONE = common.World()
SMALL = {"image_size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2}
SMALL.update(predictor_width=16, predictor_depth=1, init_std=0.2, patch_std=0.2)


def load(path, conditioning, predictor_heads):
    """Return (model, target) with the weights of a file whose encoder has 2 heads."""
    read = iwm.read_weights(path, heads=2)
    model, target = iwm.build(Config(**read["fields"], conditioning=conditioning))
    for block in model.predictor.predictor_blocks:
        block.attn.heads = predictor_heads
    iwm.load_weights(model, target, read, path)
    return model, target


# ----------------------------------------------------------------------------------------- parity


def test_predictions_losses_and_gradients():
    """In float64, but for `iwm_loss`. Gradients are summed along given directions."""
    g = golden("forward")
    patches = common.patchify(g.x.double(), 4)
    for conditioning in ("none", "sequence", "feature"):
        model, target = (network.double() for network in load(TINY, conditioning, 3))
        predictions = model(patches, g.keep, g.mask, g.action)
        close(predictions, g[f"pred_{conditioning}"], atol=1e-5)
    tokens = target(g.y.double())
    everywhere = model.predictor.everywhere(tokens, 0 * g.action)
    encoded = model.encoder(patches, keep=g.keep)
    compare(g, atol=1e-5, z_x=encoded, z_y=tokens, ft_tokens=everywhere)
    wanted = common.gather_tokens(tokens, g.mask)
    error = (predictions - wanted).square()  # losses that others use
    smooth = F.smooth_l1_loss(predictions, F.layer_norm(wanted, (16,)))
    compare(g, rtol=1e-5, loss_l2_mean=error.mean(), loss_smoothl1_ln=smooth)
    losses = {"l2_sum": error.sum() / 2, "l2_mean_ln": iwm.iwm_loss(predictions, tokens, g.mask)}
    compare(g, "loss_", rtol=1e-5, **losses)
    for kind, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        for key, direction in g.items():
            if key.startswith("dir:"):
                name = key.replace("dir:enc:", "encoder.").replace("dir:pr:", "predictor.")
                gradient = model.get_parameter(name).grad
                scale = float(gradient.norm() * direction.norm())  # what cancels in the sum
                expected = g[key.replace("dir", f"dd_{kind}")]
                close((gradient * direction).sum(), expected, atol=1e-6 * scale, rtol=1e-5)


def test_actions_and_photometric_operations():
    g = golden("actions")
    compare(g, action=iwm.make_action(g.source_jitter, g.target_jitter, g.flags))
    g = golden("photometric")
    image = g.image[None]
    theta = g.factors.float()
    neutral = torch.tensor(iwm.NEUTRAL)
    found = {"grayscale": iwm.luma(image).expand_as(image), "solarize": iwm.solarize(image)}
    found["chain_bcsh"] = iwm.jitter(image, theta[None])
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        alone = torch.where(torch.arange(4) == i, theta, neutral)
        found[name] = iwm.jitter(image, alone[None])
    compare(g, atol=1e-5, **{name: images[0] for name, images in found.items()})
    close(iwm.jitter(image, neutral[None]), image, atol=1e-6)


def test_blur_is_a_gaussian_with_reflected_borders():
    image = torch.rand(2, 3, 15, 20, generator=common.generator("image"), dtype=torch.float64)
    sigma = torch.tensor([0.4, 1.5], dtype=torch.float64)
    found = iwm.blur(image, sigma, 5)
    padded = F.pad(image, [5] * 4, mode="reflect")
    for i in range(2):
        kernel = (-0.5 * (torch.arange(-5, 6) / sigma[i]) ** 2).exp()
        kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
        expected = F.conv2d(padded[i][:, None], kernel[None, None])
        close(found[i], expected[:, 0], atol=1e-9)


def test_mrr():
    g = golden("mrr")

    def distances():
        pairs = zip(g.pred[:, None], g.bank, strict=True)
        return torch.cat([iwm.squared_distances(*pair) for pair in pairs])

    compare(g, rtol=1e-9, dist2=distances())
    predictions = g.pred[:, None].flatten(2)
    similarity = F.cosine_similarity(predictions, g.bank.flatten(2), dim=-1)
    for suffix, found in (("", distances()), ("_cosine", 1 - similarity)):
        rank = iwm.ranks(found, g.target)
        found = {f"rank{suffix}": rank, f"mrr{suffix}": (1 / rank).mean()}
        compare(g, rtol=1e-6, **found)
    first = g.target[0]
    g.bank[0, (first + 1) % 16] = g.bank[0, first]
    compare(g, tie_rank=iwm.ranks(distances(), g.target))
    config = Config(**SMALL, mrr_images=1)
    model, target = iwm.build(config)
    found = iwm.evaluate_mrr(model, target, common.open_split("letters", "val"), config, ALONE)
    compare(g, atol=1e-9, chance256=found["mrr chance"] / 100)


def test_masks_have_the_golden_statistics():
    """Of unions of blocks that do not touch the last row and column, as the golden ones."""
    g = golden("masks")
    numbers = (np.arange(20000) + 0.5) / 20000
    sizes = [iwm.block_size(u, 14, (0.15, 0.2), (0.75, 1.5), 13) for u in numbers]
    found, counts = torch.tensor(sizes).unique(dim=0, return_counts=True)
    compare(g, atol=0.02, block_sizes=found, block_probs=counts / 20000)
    random = common.generator("masks")
    hidden = []
    for size in sizes[::20]:
        uniform = torch.rand(20, 4, 2, generator=random, dtype=torch.float64)
        hidden.append(iwm.hidden_patches(uniform, size, 14, border=0))
    hidden = torch.cat(hidden).double()
    counts = hidden.sum(1)
    compare(g, atol=0.01 * 196, union_mean=counts.mean(), union_std=counts.std())
    compare(g, atol=0.03, mask_freq=hidden.mean(0).view(14, 14))
    share = counts.long().bincount(minlength=197).cumsum(0) / len(counts)
    close(share, g.union_hist.cumsum(0) / g.union_hist.sum(), atol=0.05)


SIZES = {  # the paper's: predictor depth and width, encoder parameters with their positions
    "vit_b16_equivariant_in1k": (18, 384, 85_797_120),
    "vit_b16_invariant_in1k": (12, 384, 85_797_120),
    "vit_l16_equivariant_in1k": (36, 512, 303_299_584),
}


def test_paper_presets_have_the_papers_sizes():
    for name, expected in SIZES.items():
        with torch.device("meta"):
            model = iwm.IWM(Config(**iwm.PRESETS[name]))
        tokens = model.predictor.mask_token
        depth = len(model.predictor.predictor_blocks)
        assert (depth, tokens.shape[2], count(model.encoder)) == expected


# ------------------------------------------------------------------------------------------ views


def pair(images, **fields):
    """Return two views, as pixels in 0..1, the action and the parameters. fields: what is done."""
    config = replace(Config(jitter_share=0.0, grey=0.0, blur=0.0, solarize=0.0), **fields)
    views = iwm.draw_views(len(images), config, common.generator("views"))
    x, y, action = iwm.make_pair(images, views, config)
    return x * common.STD + common.MEAN, y * common.STD + common.MEAN, action, views


def test_views_differ_only_in_what_the_action_says():
    images = torch.rand(8, 3, 16, 16, generator=common.generator("images"))
    for name, operation, number in (("grey", iwm.luma, 4), ("solarize", iwm.solarize, 6)):
        x, y, action, _ = pair(images, **{name: 1.0})
        close(x, operation(images).expand_as(images), atol=1e-5)
        close(y, images, atol=1e-5)
        close(action, torch.eye(7)[number].expand(8, 7))
    x, y, action, views = pair(images, jitter_share=1.0)
    close(views[0] + action[:, :4], views[1], atol=1e-6)
    close(x, iwm.jitter(images, views[0]), atol=1e-5)
    close(y, iwm.jitter(images, views[1]), atol=1e-5)
    x, y, action, _ = pair(images, blur=0.5)
    blurred = (x != y).flatten(1).any(1)
    assert 0 < blurred.sum() < 8
    close(action, torch.eye(7)[5] * blurred[:, None])


def test_draws_follow_the_settings():
    config = Config(jitter=(0.4, 0.3, 0.2, 0.1))
    *theta, flags, _, sigma = iwm.draw_views(4000, config, common.generator(5))
    change = torch.stack(theta) - torch.tensor(iwm.NEUTRAL)  # [2, 4000, 4]
    applied = change.any(2)
    close(applied.sum(0).bincount() / 4000, [0.04, 0.32, 0.64], atol=0.03)  # each view's coin
    spread = change[applied].abs()
    close(spread.amax(0), config.jitter, atol=1e-3)
    close(spread.mean(0), [0.2, 0.15, 0.1, 0.05], rtol=0.05)
    assert change[:, :, 0].prod(0).mean().abs() < 0.004, "drawn together"
    close(flags.mean(0), [0.2, 0.2, 0.1], atol=0.025)
    close([sigma.min(), sigma.max()], config.blur_sigma, atol=0.01)


def test_masks():
    """What is hidden is not visible. Blocks reach the border, masks are cut at random."""
    config = Config(batch=64, micro=64, image_size=32, patch=4)
    cover = torch.zeros(64)
    for number in range(60):
        visible, hidden = iwm.sample_masks(config, number)
        both = torch.cat([visible, hidden], dim=1).sort(1).values
        assert (both.diff(dim=1) > 0).all() and visible.shape[1] >= 8
        cover += hidden.flatten().bincount(minlength=64)
    cover /= cover.sum()
    assert cover[-8:].min() > 0 and abs(cover[:32].sum() - 0.5) < 0.03


# ---------------------------------------------------------------------------------------- weights


def test_i_jepa_checkpoints_are_an_unconditioned_start():
    """Official and ijepa.py's own: the same predictions as I-JEPA's predictor makes of a block."""
    g = golden_tensors("ijepa", "forward")
    model, _ = load(GOLDEN / "ijepa" / "tiny_ijepa.pth.tar", "none", 2)
    batch = (common.patchify(g.imgs_q / 16, 4), g.masks_enc[0])
    action = torch.rand(len(g.imgs_q), 7)
    found = torch.cat([model(*batch, block, action) for block in g.masks_pred])
    compare(g, atol=1e-5, pred_out=found)
    flags = "--steps 1 --eval none --lr 0 --lr-start 0 --lr-final 0 --out"
    here(SCRIPTS["ijepa"], SCRIPTS["ijepa"].small, flags, "start")
    run(SCRIPT.small, flags, "conditioned --init start/last.pt")
    start = weights("start")[1]
    state = weights("conditioned")[1]
    assert all(torch.equal(state[name], value) for name, value in start.items())
    assert {name.split(".")[2] for name in state.keys() - start.keys()} == {"cond"}
    assert iwm.read_weights("conditioned/last.pt")["fields"]["conditioning"] == "feature"


# ------------------------------------------------------------------------------------- evaluation


def test_ranking_finds_a_perfect_world_model():
    """A model that returns the transformed latent has MRR 1; told another's action, chance."""
    image = torch.rand(3, 16, 16, generator=common.generator("image"))
    encode = functools.partial(common.patchify, patch=4)  # pixels as latents

    def everywhere(tokens, action):
        theta = action[:, :4] + torch.tensor(iwm.NEUTRAL)
        versions = iwm.jitter(image.expand(len(action), -1, -1, -1), theta)
        return encode(common.normalize(255 * versions))

    perfect = SimpleNamespace(encoder=encode, predictor=SimpleNamespace(everywhere=everywhere))
    rest = (encode, image, Config(mrr_bank=32), common.generator("bank"))
    versions, true, distances = iwm.rank_transformations(perfect, *rest)
    assert distances.shape == (3, 8, 32) and versions.shape == (32, 3, 16, 16)
    assert (iwm.ranks(distances[0], true) == 1).all()
    assert (1 / iwm.ranks(distances[1], true)).mean() < 0.5


def test_mosaics():
    images = torch.zeros(2, 3, 24, 24)
    images[1] = 1
    row = iwm.mosaic(images, 8)[0, 0, 0]
    assert row.tolist() == [0.0] * 8 + [1.0] * 16


def test_tuning_leaves_the_encoder_frozen_and_learns():
    """Head, predictor or all; two tasks with one predictor: is an image light, which half is."""
    config = Config(**SMALL, tune_epochs=12, tune_batch=32, tune_lr=1e-2, out="tuned")
    labels = np.arange(128) % 2
    noise = np.random.default_rng(0).integers(0, 100, (128, 16, 16, 3))
    pixels = 100 * labels[:, None, None, None] + noise
    split = common.in_memory(pixels, labels, ["dark", "light"], "train")
    rest = (split, split, config, ALONE, common.Run(config, ALONE))
    model, target = iwm.build(config)
    before = copy.deepcopy(target.state_dict())
    settings = ((None, False), (model.predictor, False), (model.predictor, True))
    for predictor, all_of_it in settings:
        found = iwm.tune(target, predictor, ["class"], *rest, all_of_it=all_of_it, fresh=True)
        assert found["class"] > 90
    torch.testing.assert_close(target.state_dict(), before, atol=0, rtol=0)
    config.tune_epochs = 40
    both = iwm.tune(target, model.predictor, ["class", "segment"], *rest, fresh=True)
    assert min(both.values()) > 75, "one predictor, two tasks"


def test_tuning_that_diverges_ends_with_a_line(capsys):
    flags = "--steps 1 --tune-epochs 0.2 --tune-lr 1e30 --eval attentive"
    printed = refused(capsys, SCRIPT, SCRIPT.small, flags, code=3)
    assert "three steps of tuning" in printed and "--tune-lr" in printed


@pytest.mark.parametrize("conditioning", ["none", "sequence"])
def test_other_conditionings_train(conditioning):
    run(SCRIPT.small, f"--steps 2 --conditioning {conditioning} --out run")
    assert (log_rows("run")[-1]["action_ratio"] == 1) == (conditioning == "none")


def test_iwm_learns():
    """The predictor uses the action, and finds the transformed view among others."""
    flags = "--steps 120 --batch 48 --micro 48 --mrr-images 16 --eval mrr"
    *steps, found, evaluation = learn(SCRIPT, flags)
    results = evaluation["eval"]["trained"]
    assert steps[-1]["feature_std"] > 0.02 and steps[-1]["feature_rank"] > 3, "collapsed"
    assert found["action_ratio"] > 1.1 and found["content_ratio"] > 1.0
    assert results["mrr"] > 1.3 * results["mrr rolled"]
