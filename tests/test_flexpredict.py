"""flexpredict.py against the reference's numbers (golden/flexpredict), and its own promises.

What it shares with ijepa.py byte for byte is tested there; what all scripts promise, in
test_runs.py.
"""

import functools
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, golden_tensors, log_rows, networks, norms
from PIL import Image
from reference import reference_masks
from test_ijepa import RATES, train_steps
from test_runs import SCRIPTS, here, learn, refused

import common
import flexpredict
from flexpredict import Config

SCRIPT = SCRIPTS["flexpredict"]
run = functools.partial(here, SCRIPT)
golden = functools.partial(golden_tensors, "flexpredict")
tiny = functools.partial(networks, flexpredict, GOLDEN / "flexpredict" / "tiny_stop.pth.tar", 4)
compare = functools.partial(helpers.compare, atol=1e-5)


def inputs():
    """Return (golden file, what a model takes: patches, context [B, K], targets [M, B, Kp])."""
    g = golden("forward")
    return g, (common.patchify(g.imgs, 4), g.masks_enc[0], g.masks_pred)


# ----------------------------------------------------------------------------------------- parity

GRADIENTS = {
    "predictor_embed_w": "predictor.predictor_embed.weight",
    "predictor_embed_b": "predictor.predictor_embed.bias",
    "enc_norm_w": "encoder.norm.weight",
    "patch_proj_w": "encoder.patch_embed.proj.weight",
    "enc_qkv0": "encoder.blocks.0.attn.qkv.weight",
    "pred_proj_w": "predictor.predictor_proj.weight",
    "pred_qkv0": "predictor.predictor_blocks.0.attn.qkv.weight",
}


def test_forward_loss_and_gradients():
    """The gradient of W, predictor_embed, is that of both its uses: context and noise."""
    g, (patches, context, targets) = inputs()
    _, model, target = tiny()
    positions = model.predictor.predictor_pos_embed[0]
    compare(g, atol=1e-6, pos_embed=target.pos_embed[0], pred_pos_embed=positions)
    encoded = model.encoder(patches, keep=context)
    predictions = model.predictor(encoded, context, targets, g.noise)
    tokens = target(patches)
    wanted = F.layer_norm(common.gather_tokens(tokens, targets), (20,))
    compare(g, enc_ctx=encoded, pred_code=predictions, target_tokens=tokens, targets=wanted)
    loss = flexpredict.jepa_loss(predictions, tokens, targets)
    loss.backward()
    gradient = model.predictor.predictor_embed.weight.grad
    compare(g, atol=1e-6, loss=loss, grad_predictor_embed_w=gradient)
    found = norms(model, GRADIENTS.values(), gradients=True)
    close(found, [g[f"gn_{name}"] for name in GRADIENTS], rtol=1e-4)
    pooled = flexpredict.encode(target, g.imgs).transpose(0, 1)  # [2 blocks, B, D]
    compare(g, target_pooled=pooled[-1], target_blocks_pooled=pooled)
    target.norm = torch.nn.Identity()
    pooled = flexpredict.encode(target, g.imgs).transpose(0, 1)
    compare(g, target_blocks_pooled_nonorm=pooled)


def test_the_papers_and_the_exact_variant():
    g, batch = inputs()
    compare(g, pred_paper=tiny(mode="stop_paper")[1](*batch, g.noise))
    config, model, _ = tiny(mode="ijepa")
    assert flexpredict.draw_noise(config, 0, 11, "cpu") is None
    compare(g, pred_ijepa=model(*batch))
    model.predictor.mask_token.data.zero_()
    compare(g, pred_nostop=model(*batch))
    model = tiny()[1]  # no noise asks about the mean position
    close(model(*batch), model(*batch, 0 * g.noise), atol=1e-5)


def test_noise_has_the_covariance_of_the_released_code():
    g = golden("cov")
    config, model, _ = tiny(sigma=float(g.sigma), micro=2500)
    weight = model.predictor.predictor_embed.weight.detach()
    compare(g, atol=1e-6, cov_expected=g.sigma**2 * weight @ weight.T)
    noise, other = (flexpredict.draw_noise(config, number, 20, "cpu") for number in range(2))
    assert noise.shape == (4, 2500, 20, 20) and (noise != other).all()
    positions = flexpredict.stochastic_positions(torch.ones(16), noise, weight)
    found = positions.flatten(0, 2).T.cov()
    largest = float(g.cov_expected.max())
    compare(g, atol=0.03 * largest, cov_expected=found, cov_mc=found)
    assert (found - g.cov_paper_literal).abs().max() > largest


def test_three_training_steps():
    """Noise, loss, schedules, AdamW and EMA together, against three steps of the reference."""
    g = golden("train_trace")
    _, (patches, *masks) = inputs()
    *rates, steps_an_epoch, epochs, warmup = g.schedule.tolist()
    fields = dict(zip(RATES, [*rates, 0.996], strict=True))
    config, model, target = tiny(warmup=warmup / epochs, **fields)

    def compute_loss(step):
        predictions = model(patches, *masks, g.noise[step])
        return flexpredict.jepa_loss(predictions, target(patches), masks[1])

    steps = int(steps_an_epoch * epochs)
    losses = train_steps(flexpredict, g, config, steps, model, target, compute_loss)
    close(losses, g.losses, rtol=1e-4)
    parts = {"enc": model.encoder, "pred": model.predictor, "tgt": target}
    for name, module in parts.items():
        state = module.state_dict()
        weights = [state[key] for key in (g.pred_keys if name == "pred" else g.enc_keys)]
        found = torch.tensor([[x.sum(), x.abs().sum()] for x in weights])
        scale = found[:, 1:].clamp(min=1e-8)
        close(found / scale, g[f"{name}_sums"] / scale, atol=1e-4)


def test_schedules_to_the_last_step():
    g = golden("schedules")
    for name in ("b16", "h16"):
        config = Config(**flexpredict.PRESETS[f"vit_{name}_in1k"])
        for i, step in enumerate(g[f"{name}_step"].tolist()):
            lr, wd, ema = flexpredict.schedules(config, step - 1, int(config.epochs * g.ipe))
            compare(g, f"{name}_", atol=1e-12, at=i, lr=lr, wd=wd, ema=ema)


def test_masks():
    """Block sizes, the reference's draws, and statistics of our own. The sampler is ijepa.py's."""
    g = golden("masks")
    config = Config(image_size=224, patch=16, released=True, min_context=11, batch=8, micro=8)
    sizes = [flexpredict.block_sizes(config, step) for step in range(200)]
    found = {"sizes_by_seed": torch.tensor(sizes).flatten(1)}
    torch.manual_seed(14)
    for call in range(3):
        found[f"draw{call}_enc"], found[f"draw{call}_pred"] = reference_masks(config, call, 4)
    compare(g, **found)
    draws = [flexpredict.sample_masks(replace(config, seed=i % 4), i // 4) for i in range(1600)]
    contexts, targets = zip(*draws, strict=True)
    lengths = [blocks.shape[2] for blocks in targets[::4]]
    compare(g, stat_pred_kept_per_iter=lengths)
    seen = torch.cat([context.flatten() for context in contexts]).bincount(minlength=196) / 12800
    unions = torch.stack([F.one_hot(blocks, 196).amax((0, 2)) for blocks in targets])
    union = unions.double().mean((0, 1))
    means = {"ctx_mean": seen.sum(), "union_mean": union.sum(), "pred_mean": np.mean(lengths)}
    compare(g, "stat_", rtol=0.02, **means)
    shares = {"ctx_freq": seen.view(14, 14), "pred_union_freq": union.view(14, 14)}
    compare(g, "stat_", atol=0.03, **shares)


def test_low_shot():
    g = golden("lowshot")
    train, val = map(flexpredict.standardise, (g.Xt, g.Xv))
    weight = flexpredict.logistic_regression(train, g.yt, 4, g.lambd)
    logits = train @ weight.T
    val_logits = val @ weight.T
    objective = F.cross_entropy(logits, g.yt) + g.lambd / 120 * weight.square().sum()
    compare(g, atol=1e-4, objective=objective)
    compare(g, atol=1e-3, W=weight)
    compare(g, atol=1e-2, train_logits=logits, val_logits=val_logits)
    train_acc = common.top1(logits, g.yt) / 100
    compare(g, train_acc=train_acc, val_acc=common.top1(val_logits, g.yv) / 100)
    assert (flexpredict.standardise(torch.ones(5, 2)) == 0).all()


def test_label_propagation():
    g = golden("labelprop")
    first = F.one_hot(g.first_labels.long()).permute(2, 0, 1)
    settings = (int(g[name]) for name in ("n_last", "radius", "topk"))
    soft = flexpredict.propagate_labels(g.feats.unflatten(1, (6, 7)), first, *settings)
    labels = flexpredict.label_maps(soft, int(g.patch), (24, 28))
    compare(g, first_onehot=first, seg=soft, argmax_up=labels)


def test_region_and_contour():
    g = golden("jf")
    means = []
    for i in (1, 2):
        values = flexpredict.region_and_contour(g.pred == i, g.gt == i)
        statistics = flexpredict.sequence_statistics(values[1:-1])
        means.append(statistics[0].mean())
        j, f = values.T
        j_stats, f_stats = statistics.T
        compare(g, atol=1e-9, at=i - 1, J=j, F=f, J_stats=j_stats, F_stats=f_stats)
    boundary = flexpredict.boundary(g.gt == 1)[0]
    compare(g, atol=1e-9, JF_mean=np.mean(means), bmap0=boundary)
    empty = torch.zeros(1, 9, 9, dtype=torch.bool)
    assert (flexpredict.region_and_contour(empty, empty) == 1).all()
    line = torch.eye(9, dtype=torch.bool)[None]
    assert (flexpredict.region_and_contour(empty, line) == 0).all()


def test_mirrored_grey_and_blurred_views():
    random = common.generator("views")
    images = torch.randint(0, 256, (200, 3, 24, 24), dtype=torch.uint8, generator=random)

    def change(**fields):
        """Return the images that are changed, before and after."""
        views = images.clone()
        flexpredict.augment(views, Config(**fields), random)
        changed = (views != images).flatten(1).any(1)
        return images[changed], views[changed]

    before, after = change(flip=True)
    assert 70 < len(after) < 130 and torch.equal(after, before.flip(3))
    _, after = change(grey=0.3)
    assert 40 < len(after) < 80 and (after == after[:, :1]).all()
    before, after = (x.float().flatten(1).std(1) for x in change(blur=0.7))
    assert 100 < len(after) < 160 and (after < before).all()


# ------------------------------------------------------------------------------------- evaluation


def test_toy_scenes_are_what_their_labels_say():
    pixels, labels = flexpredict.toy_scenes(20, 48, frames=8)
    background, lighter, darker = (pixels[labels == label].mean() for label in range(3))
    close([lighter - background, darker - background], [40, -40], atol=10)
    val = common.open_split("scenes", "val")
    assert len(val) == 2000 and val.images[0].size == (24, 24)


def test_video_evaluation_of_a_perfect_and_of_a_blind_encoder():
    """Tokens that say which object covers how much of a patch score high; equal ones cannot."""
    _, labels = next(flexpredict.toy_videos(24))
    shares = F.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
    perfect = F.avg_pool2d(shares, 4).permute(0, 2, 3, 1)  # [T, h, w, 3]
    seen, blind = (flexpredict.segment_video(x, labels, 4) for x in (perfect, 0 * perfect + 1))
    assert seen[:, 0, 0].mean() > 0.6 > blind[:, 0, 0].mean() + 0.2


def davis(name, mode="P", value=1, frames=6):
    """Write a DAVIS folder of one sequence, `ball`, a bright square that moves to the right."""
    root = Path(name)
    images, masks = (root / kind / "480p/ball" for kind in ("JPEGImages", "Annotations"))
    listed = root / "ImageSets/2017"
    for folder in (images, masks, listed):
        folder.mkdir(parents=True)
    (listed / "val.txt").write_text("ball")
    for i in range(frames):
        square = np.zeros((96, 128), np.uint8)
        square[30:70, 20 + 8 * i : 60 + 8 * i] = 1
        Image.fromarray(200 * square).save(images / f"{i}.jpg")
        Image.fromarray(value * square).convert(mode).save(masks / f"{i}.png")
    return root


def test_davis_folder():
    """Masks with a palette and binary ones are read alike."""
    palette = davis("davis")
    flags = "--steps 1 --min-context 1 --image-size 64 --patch 16 --eval video --out run"
    run(SCRIPT.small, flags, "--davis", palette)
    result = log_rows("run")[-1]["eval"]["trained"]
    assert 30 < result["J&F"] <= 100
    close(result["J&F"], (result["J"] + result["F"]) / 2, atol=1e-4)
    binary = davis("bits", mode="1", value=255)
    videos = [flexpredict.davis_sequences(folder)[0] for folder in (palette, binary)]
    (frames, labels), (_, same) = map(flexpredict.read_video, videos)
    assert labels.unique().tolist() == [0, 1] and torch.equal(same, labels)
    assert frames.shape == (6, 3, 480, 640)
    # std .228, as in the official evaluation
    close(frames[:, 0].median(), -0.485 / 0.228, atol=0.004)


def test_davis_folders_that_would_give_wrong_scores(capsys):
    """Colours are refused, and sequences that cannot be scored are named. 255 is no object."""
    folders = {
        "RGB": davis("colours", mode="RGB"),
        "an object (not 255)": davis("davis2016", mode="L", value=255),
        "three frames": davis("short", frames=2),
        "3.png cannot be read": davis("gap"),
    }
    Path("gap/Annotations/480p/ball/3.png").unlink()
    for said, folder in folders.items():
        printed = refused(capsys, SCRIPT, SCRIPT.small, "--out refused --davis", folder)
        assert said in printed and "ball" in printed and not Path("refused").exists()
    image = davis("cut") / "JPEGImages/480p/ball/2.jpg"
    image.write_bytes(image.read_bytes()[:-100])
    flags = f"{SCRIPT.small} --steps 1 --eval video --davis cut"
    assert f"{image} cannot be read" in refused(capsys, SCRIPT, flags)


def test_flexpredict_learns():
    """A tenth of the toy's run: features beat a random encoder's, and the noise stays."""
    flags = "--steps 200 --batch 32 --micro 32 --eval linear --probe-epochs 4 --workers 0"
    *_, last, _, evaluation = learn(SCRIPT, flags)
    results = evaluation["eval"]
    assert results["trained"]["linear"] > results["random"]["linear"] + 8
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"
    assert last["position_noise"] > 0.02, "the noise on positions was trained away"
