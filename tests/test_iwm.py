"""iwm.py against the numbers of its specification (golden/iwm), and its own promises.

There is no official code. What it shares with ijepa.py byte for byte is tested there; what all
scripts promise, in test_runs.py.
"""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, compare, golden_tensors, log_rows, networks
from test_runs import SCRIPTS, here, learn, refused, weights

import common
import iwm
from iwm import Config

SCRIPT = SCRIPTS["iwm"]
run = functools.partial(here, SCRIPT)
golden = functools.partial(golden_tensors, "iwm")
TINY = GOLDEN / "iwm/tiny_iwm.pt"
ALONE = common.World()
SMALL = {"image_size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2}
SMALL.update(predictor_width=16, predictor_depth=1, init_std=0.2, patch_std=0.2)


def load(path, conditioning, predictor_heads):
    """Return (model, target) with the weights of a file whose encoder has 2 heads."""
    _, model, target = networks(iwm, path, conditioning=conditioning)
    for block in model.predictor.predictor_blocks:
        block.attn.heads = predictor_heads
    return model, target


# ----------------------------------------------------------------------------------------- parity


def test_predictions_losses_and_gradients():
    """In float64, but for `iwm_loss`. Gradients are summed along given directions."""
    g = golden("forward")
    patches = common.patchify(g.x.double(), 4)
    for conditioning in ("none", "sequence", "feature"):
        model, target = (network.double() for network in load(TINY, conditioning, 3))
        predictions = model(patches, g.keep, g.mask, g.action)
        compare(g, "pred_", atol=1e-5, **{conditioning: predictions})
    encoded = model.encoder(patches, keep=g.keep)
    tokens = target(g.y.double())
    everywhere = model.predictor.everywhere(tokens, 0 * g.action)
    compare(g, atol=1e-5, z_x=encoded, z_y=tokens, ft_tokens=everywhere)
    wanted = common.gather_tokens(tokens, g.mask)
    losses = {
        "l2_mean_ln": iwm.iwm_loss(predictions, tokens, g.mask),  # the others: to compare with
        "l2_mean": F.mse_loss(predictions, wanted),
        "l2_sum": F.mse_loss(predictions, wanted, reduction="sum") / 2,
        "smoothl1_ln": F.smooth_l1_loss(predictions, F.layer_norm(wanted, (16,))),
    }
    compare(g, "loss_", rtol=1e-5, **losses)
    parts = {"enc": model.encoder, "pr": model.predictor}
    for key in g:
        kind, _, place = key.partition(":")  # dd_LOSS:PART:PARAMETER
        if kind.startswith("dd_"):
            part, name = place.split(":")
            parameter = parts[part].get_parameter(name)
            loss = losses[kind.removeprefix("dd_")]
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            direction = g[f"dir:{place}"]
            scale = float(gradient.norm() * direction.norm())  # what cancels in the sum
            close((gradient * direction).sum(), g[key], atol=1e-6 * scale, rtol=1e-5)


def test_actions_and_photometric_operations():
    g = golden("actions")
    compare(g, action=iwm.make_action(g.source_jitter, g.target_jitter, g.flags))
    g = golden("photometric")
    image = g.image[None]
    theta = g.factors.float()
    neutral = torch.tensor(iwm.NEUTRAL)
    found = {"chain_bcsh": iwm.jitter(image, theta[None]), "solarize": iwm.solarize(image)}
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        alone = torch.where(torch.arange(4) == i, theta, neutral)
        found[name] = iwm.jitter(image, alone[None])
    found["grayscale"] = iwm.luma(image).expand_as(image)
    compare(g, at=None, atol=1e-5, **found)  # as batches of one
    close(iwm.jitter(image, neutral[None]), image, atol=1e-6)


def test_blur_is_a_gaussian_with_reflected_borders():
    """Each image has its own std: the first one's is too small to change it."""
    image = torch.rand(1, 3, 15, 20, generator=common.generator("image"))
    kernel = (-0.5 * (torch.arange(-5, 6) / 1.5) ** 2).softmax(0)
    kernel = torch.outer(kernel, kernel).expand(3, 1, -1, -1)
    expected = F.conv2d(F.pad(image, [5] * 4, mode="reflect"), kernel, groups=3)
    found = iwm.blur(torch.cat([image, image]), torch.tensor([0.01, 1.5]), 5)
    close(found, torch.cat([image, expected]), atol=1e-6)


def test_mrr():
    g = golden("mrr")
    predictions = g.pred[:, None]  # one for each bank
    distances = torch.cat([*map(iwm.squared_distances, predictions, g.bank)])
    similarity = F.cosine_similarity(predictions.flatten(2), g.bank.flatten(2), dim=2)
    compare(g, rtol=1e-9, dist2=distances)
    for suffix, found in {"": distances, "_cosine": 1 - similarity}.items():
        rank = iwm.ranks(found, g.target)
        compare(g, rtol=1e-6, **{f"rank{suffix}": rank, f"mrr{suffix}": (1 / rank).mean()})
    first = g.target[0]
    distances[0, (first + 1) % 16] = distances[0, first]
    compare(g, tie_rank=iwm.ranks(distances, g.target))
    config = Config(**SMALL, mrr_images=1)
    letters = common.open_split("letters", "val")
    found = iwm.evaluate_mrr(*iwm.build(config), letters, config, ALONE)
    compare(g, atol=1e-9, chance256=found["mrr chance"] / 100)


def test_masks_have_the_golden_statistics():
    """Of unions of blocks that do not touch the last row and column, as the golden ones."""
    g = golden("masks")
    numbers = torch.linspace(0, 1, 1000).tolist()
    sizes = [iwm.block_size(u, 14, (0.15, 0.2), (0.75, 1.5), 13) for u in numbers]
    found, counts = torch.tensor(sizes).unique(dim=0, return_counts=True)
    compare(g, atol=0.02, block_sizes=found, block_probs=counts / 1000)
    uniform = torch.rand(1000, 20, 4, 2, generator=common.generator("masks"), dtype=torch.float64)
    draws = zip(uniform, sizes, strict=True)
    hidden = torch.cat([iwm.hidden_patches(*draw, 14, border=0) for draw in draws]).double()
    counts = hidden.sum(1)
    compare(g, atol=0.01 * 196, union_mean=counts.mean(), union_std=counts.std())
    compare(g, atol=0.03, mask_freq=hidden.mean(0).view(14, 14))
    share = counts.long().bincount(minlength=197).cumsum(0) / 20000
    close(share, g.union_hist.cumsum(0) / g.union_hist.sum(), atol=0.05)


# ------------------------------------------------------------------------------------------ views


def test_views_differ_in_what_the_action_says():
    """Both are jittered. The source alone may then turn grey, be blurred and be solarized."""
    images = torch.rand(64, 3, 16, 16, generator=common.generator("images"))
    config = Config(grey=0.5, blur=0.5, solarize=0.5)
    views = iwm.draw_views(64, config, common.generator("views"))
    *thetas, flags, _, sigma = views
    x, y = (iwm.jitter(images, theta) for theta in thetas)
    grey, blurred, solarized = flags.bool().T
    x[grey] = iwm.luma(x[grey]).expand(-1, 3, -1, -1)
    x[blurred] = iwm.blur(x[blurred], sigma, 3)
    x[solarized] = iwm.solarize(x[solarized])
    expected = [common.normalize(255 * x), common.normalize(255 * y)]
    expected.append(iwm.make_action(*thetas, flags))
    torch.testing.assert_close(list(iwm.make_pair(images, views, config)), expected)


def test_draws_follow_the_settings():
    config = Config(jitter=(0.4, 0.3, 0.2, 0.1))
    *theta, flags, _, sigma = iwm.draw_views(4000, config, common.generator(5))
    change = torch.stack(theta) - torch.tensor(iwm.NEUTRAL)  # [2, 4000, 4]
    applied = change.any(2)
    close(applied.sum(0).bincount() / 4000, [0.04, 0.32, 0.64], atol=0.03)  # each view's coin
    strength = change[applied].abs()
    close(strength.amax(0), config.jitter, atol=1e-3)
    close(strength.mean(0), np.divide(config.jitter, 2), rtol=0.05)
    assert change[:, :, 0].prod(0).mean().abs() < 0.004, "drawn together"
    close(flags.mean(0), [0.2, 0.2, 0.1], atol=0.025)
    close(sigma.aminmax(), config.blur_sigma, atol=0.01)


def test_masks():
    """What is hidden is not visible. Blocks reach the border, masks are cut at random."""
    config = Config(batch=4000, micro=4000, image_size=32, patch=4, min_visible=20)
    visible, hidden = iwm.sample_masks(config, 0)
    both = torch.cat([visible, hidden], dim=1).sort(1).values
    assert (both.diff(dim=1) > 0).all() and visible.shape[1] >= 20
    share = hidden.flatten().bincount(minlength=64) / hidden.numel()
    assert share[-8:].min() > 0 and abs(share[:32].sum() - 0.5) < 0.03


# ---------------------------------------------------------------------------------------- weights


def test_i_jepa_checkpoints_are_an_unconditioned_start():
    """Official and ijepa.py's own: the same predictions as I-JEPA's predictor makes of a block."""
    g = golden_tensors("ijepa", "forward")
    model, _ = load(GOLDEN / "ijepa/tiny_ijepa.pth.tar", "none", 2)
    batch = (common.patchify(g.imgs_q / 16, 4), g.masks_enc[0])
    found = [model(*batch, block, torch.rand(3, 7)) for block in g.masks_pred]
    compare(g, atol=1e-5, pred_out=torch.cat(found))
    still = "--steps 1 --eval none --lr 0 --lr-start 0 --lr-final 0 --out"
    here(SCRIPTS["ijepa"], SCRIPTS["ijepa"].small, still, "start")
    run(SCRIPT.small, still, "conditioned --init start/last.pt")
    start = weights("start")[1]
    state = weights("conditioned")[1]
    told = {name: state.pop(name) for name in state.keys() - start.keys()}
    assert told and all(name.startswith("model.predictor.cond.") for name in told)
    torch.testing.assert_close(state, start, atol=0, rtol=0)


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
    bank = (Config(mrr_bank=32), common.generator("bank"))
    _, true, distances = iwm.rank_transformations(perfect, encode, image, *bank)
    right, rolled, _ = (1 / iwm.ranks(kind, true) for kind in distances)
    assert (right == 1).all() and rolled.mean() < 0.5


def test_mosaics():
    images = torch.zeros(3, 3, 24, 24)
    images[2] = 1  # it stands before the first one
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
    for predictor, all_of_it in ((None, False), (model.predictor, False), (model.predictor, True)):
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


def test_other_conditionings_train():
    for name in ("none", "sequence"):
        run(SCRIPT.small, f"--steps 2 --conditioning {name} --out {name}")
        assert (log_rows(name)[-1]["action_ratio"] == 1) == (name == "none")


def test_iwm_learns():
    """The predictor uses the action, and finds the transformed view among others."""
    flags = "--steps 120 --batch 48 --micro 48 --mrr-images 16 --eval mrr"
    *_, last, found, evaluation = learn(SCRIPT, flags)
    results = evaluation["eval"]["trained"]
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"
    assert found["action_ratio"] > 1.1 and found["content_ratio"] > 1.0
    assert results["mrr"] > 1.3 * results["mrr rolled"]
