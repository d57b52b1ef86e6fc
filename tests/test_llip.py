"""llip.py against the numbers of the reference implementation (tests/golden/llip) and against its own promises."""

import io
import json
import math
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import log_rows, run, run_several
from PIL import Image

import common
import llip
from llip import Config, Log, World

GOLDEN = Path(__file__).parent / "golden" / "llip"
ALONE = World(0, 1, torch.device("cpu"))
FLAGS = {
    "llip_tiny": dict(heads=4, text_heads=2, mix_heads=4, tau=5.0),
    "llip_tiny_norm_legacy": dict(heads=2, text_heads=3, mix_heads=2, tau=5.0),
}


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=2e-5, rtol=1e-4):
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected, torch.float64), atol=atol, rtol=rtol)


def tiny(name="llip_tiny", **changes):
    """One of the golden checkpoints, with what the file cannot tell given by flags."""
    flags = FLAGS[name] | changes
    model, _, config = llip.load_model(GOLDEN / f"{name}.pt", replace(Config(), **flags), flags)
    return model.requires_grad_(), config


def pieces(model, images, tokens):
    """(k, v, q, z') as the golden files have them."""
    k, v = model.image(images).unbind(1)
    q, z = model.text(tokens).unbind(1)
    return k, v, q.unflatten(1, (k.shape[1], -1)), z


def official(name):
    """The released name of one of our parameters."""
    return "pred.out_proj" if name == "out_proj" else name


def loss_of(model, images, tokens, config, budget=2**20):
    return llip.contrastive_loss(*model(images, tokens), config, budget)


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("name", FLAGS)
def test_towers_and_head(name):
    g = golden("llip_forward" + "_norm" * ("norm" in name))
    model, config = tiny(name)
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])
    x = model.visual.embed(images)
    close(x, g["vis_ln_pre"])
    close(model.visual.transformer.resblocks[0](x), g["vis_block0"])
    close(model.visual(images), g["vis_tokens"])
    close(model.hidden(tokens), g["text_hidden"])
    k, v, q, z = pieces(model, images, tokens)
    for ours, theirs in ((k, "K"), (v, "V"), (q, "Q"), (z, "zt")):
        close(ours, g[theirs])
    a = llip.mixing_weights(k, q, 5)
    close(a, g["attn_tau5"])
    close(torch.einsum("bthk,bhkd->bthd", a, v).flatten(2) @ model.out_proj, g["z_tau5"])
    for tau in (1, 5, 8):
        close(llip.pair_scores(k, v, q, z, model.out_proj, tau), g[f"cos_tau{tau}"], atol=1e-5)
    close(llip.pair_scores(k, v, q, z, model.out_proj, 5), g["f64_cos"], atol=1e-5)
    assert config.mix_norm == ("norm" in name)


@pytest.mark.parametrize("budget", [1, 3000, 2**24])
@pytest.mark.parametrize("name", FLAGS)
def test_loss_and_gradients(name, budget):
    """Of the pair loss, in tiles of one pair, of a few, and of all."""
    g = golden("llip_forward" + "_norm" * ("norm" in name))
    model, config = tiny(name)
    n = len(g["logits_tau5"])
    images, tokens = tensor(g["images"])[:n], torch.from_numpy(g["tokens"])[:n]
    k, v, q, z = pieces(model, images, tokens)
    logits = model.logit_scale.exp() * llip.pair_scores(k, v, q, z, model.out_proj, 5) + model.logit_bias
    close(logits, g["logits_tau5"], atol=5e-5)
    loss = loss_of(model, images, tokens, config, budget)
    close(loss, g["loss_tau5"], atol=5e-5)
    close(loss, g["f64_loss"], atol=5e-5)
    loss.backward()
    found = {official(n): p.grad for n, p in model.named_parameters()}
    assert set(found) == set(g["grad_names"])
    for parameter, norm in zip(g["grad_names"], g["grad_norms"]):
        close(found[parameter].norm(), norm, atol=1e-6)
    close(model.visual.class_embedding.grad, g["grad_class_embedding"], atol=1e-6)
    close(model.out_proj.grad, g["grad_out_proj"], atol=1e-6)
    close(model.q_proj.grad, g["grad_q_proj"], atol=1e-6)
    close(model.logit_scale.grad.sum(), g["grad_logit_scale"], atol=1e-6)
    close(model.logit_bias.grad.sum(), g["grad_logit_bias"], atol=1e-6)


def test_decayed_parameters():
    for name in FLAGS:
        model, config = tiny(name)
        groups = llip.make_optimizer(model, config).param_groups
        left = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        names = {official(n) for n, p in model.named_parameters() if id(p) in left}
        assert names == set(golden("llip_forward" + "_norm" * ("norm" in name))["no_decay_names"])
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_pair_loss_in_double_precision():
    """gradcheck, and equality with autograd of the plain form, for several tiles and an offset of the true pairs."""
    torch.manual_seed(0)
    shapes = dict(k=(3, 2, 4, 3), v=(3, 2, 4, 3), q=(7, 2, 3), t=(7, 6), out=(6, 6), scale=(1,), bias=(1,))
    inputs = [torch.randn(s, dtype=torch.double).requires_grad_() for s in shapes.values()]
    assert torch.autograd.gradcheck(lambda *x: llip.PairLoss.apply(*x, 2.0, 2, 1500, True), inputs, fast_mode=True)

    def plain(k, v, q, t, out, scale, bias):
        m = torch.einsum("bthk,bhkd->bthd", llip.mixing_weights(k, q, 2.0), v).flatten(2) @ out
        score = torch.einsum("btd,td->bt", F.normalize(m, dim=-1), t)
        y = -torch.ones_like(score)
        y[range(3), range(2, 5)] = 1
        return -F.logsigmoid(y * (scale * score + bias)).sum()

    expected = torch.autograd.grad(plain(*inputs), inputs)
    found = llip.PairLoss.apply(*inputs, 2.0, 2, 1500, True)
    close(found, plain(*inputs).detach(), atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(found, inputs), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("shape", [(24, 4, 8, 64), (17, 8, 64, 32), (40, 1, 3, 16)])
def test_tiles_equal_the_naive_form_in_float32(shape):
    """Forward and gradients to 1e-5, relative to the largest entry; images [n, H, K, D/H]."""
    n, heads, tokens, width = shape
    torch.manual_seed(0)
    kv, qt = torch.randn(n, 2, heads, tokens, width // heads), torch.randn(n, 2, width)
    head = dict(out_proj=torch.randn(width, width) / 8, scale=torch.tensor([14.0]), bias=torch.tensor([-3.0]))
    config = Config(mix_heads=heads, embedding=width, mixture_tokens=tokens, tau=2.0)
    inputs = [x.requires_grad_() for x in (kv, qt, *head.values())]
    score = llip.pair_scores(*kv.unbind(1), qt[:, 0].unflatten(1, (heads, -1)), qt[:, 1], head["out_proj"], 2.0)
    naive = -F.logsigmoid((2 * torch.eye(n) - 1) * (head["scale"] * score + head["bias"])).sum() / n
    expected = torch.autograd.grad(naive, inputs)
    for budget in (1, 2**16, 2**26):
        found = llip.contrastive_loss(kv, qt, head, config, budget)
        close(found, naive.detach(), rtol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(found, inputs), expected):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_pair_loss_takes_half_precision_and_scaled_gradients():
    model, config = tiny()
    g = golden("llip_forward")
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])[:4]
    image, text, head = model(images, tokens)
    image = image.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = llip.contrastive_loss(image, text.detach(), {k: v.detach() for k, v in head.items()}, config, 4096)
    (1024 * loss).backward()
    exact = image.detach().float().requires_grad_()
    llip.contrastive_loss(exact, text.detach(), {k: v.detach() for k, v in head.items()}, config, 4096).backward()
    assert loss.dtype == torch.float32 and image.grad.dtype == torch.bfloat16
    torch.testing.assert_close(image.grad.float() / 1024, exact.grad, rtol=1e-2, atol=1e-6)
    with torch.no_grad():
        close(llip.contrastive_loss(exact, text, head, config, 4096), loss)


def test_invariances_of_mixing():
    model, config = tiny()
    g = golden("llip_forward")
    k, v, q, z = (x.detach() for x in pieces(model, tensor(g["images"]), torch.from_numpy(g["tokens"])))
    out = model.out_proj.detach()
    score = llip.pair_scores(k, v, q, z, out, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(llip.pair_scores(k[:, :, order], v[:, :, order], q, z, out, 5), score)
    close(llip.pair_scores(k + torch.randn(4, 4, 1, 4), 7 * v, 2 * q, 3 * z, out, 10.0), llip.pair_scores(k, v, q, z, out, 5))
    uniform = F.normalize(v.mean(2).flatten(1) @ out, dim=-1) @ F.normalize(z, dim=-1).T
    close(llip.pair_scores(k, v, q, z, out, 1e9), uniform)
    assert (score - uniform).abs().max() > 0.01


def test_one_mixture_token_is_siglip():
    """With K = 1 the caption has nothing to choose: SigLIP with the projection v_proj @ out_proj."""
    config = Config(mixture_tokens=1)
    one, other = llip.build(config, 40), llip.build(replace(config, model="siglip"), 40)
    shared = {k: v for k, v in one.state_dict().items() if k in other.state_dict()}
    other.load_state_dict(shared | {"visual.proj": one.v_proj[0].detach() @ one.out_proj.detach()})
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(40, (6, 16))
    close(loss_of(one, images, tokens, config), loss_of(other, images, tokens, other.config).detach(), atol=1e-5)


def test_all_parameters_get_gradients():
    for name in llip.MODELS:
        config = Config(model=name)
        model = llip.build(config, 40)
        loss_of(model, torch.randn(6, 3, 32, 32), torch.randint(40, (6, 16)), config).backward()
        for parameter, p in model.named_parameters():
            if not (name == "registers" and parameter == "visual.proj"):
                assert p.grad is not None and p.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", ["clip_gelu", "siglip", "register", "average"])
def test_baselines(name, tmp_path):
    g = golden("baselines")
    prefix = "sd/ncls1/" if name in ("clip_gelu", "siglip") else "sd/nclsN/"
    weights = {k.removeprefix(prefix): tensor(g[k]) for k in g.files if k.startswith(prefix)}
    if name == "clip_gelu":
        weights = {k: v.half() if v.dim() > 1 else v for k, v in weights.items() if k != "logit_bias"}
        weights |= dict(input_resolution=torch.tensor(12), context_length=torch.tensor(8), vocab_size=torch.tensor(33))
        exact = {k: tensor(g[prefix + k]) for k in weights if prefix + k in g.files}
    torch.save(weights, tmp_path / "weights.pt")
    kind = {"clip_gelu": "clip", "register": "registers"}.get(name, name)
    flags = dict(model=kind, heads=2, text_heads=2, quick_gelu=name != "clip_gelu")
    model, _, config = llip.load_model(tmp_path / "weights.pt", replace(Config(), **flags), flags)
    if name == "clip_gelu":  # as half precision loads, the golden numbers are those of the exact weights
        torch.save(exact, tmp_path / "exact.pt")
        model, _, config = llip.load_model(tmp_path / "exact.pt", replace(Config(), **flags), flags)
        assert model.logit_bias is None
    model.requires_grad_()
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])
    close(model.image(images), g[f"{name}_image"])
    close(model.text(tokens)[:, 0], g[f"{name}_text"])
    loss = loss_of(model, images, tokens, config)
    close(loss, g[f"{name}_loss"], atol=5e-5)
    loss.backward()
    close(model.logit_scale.grad.sum(), g[f"{name}_grad_scale"], atol=1e-6)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    close(torch.nn.utils.get_total_norm(gradients), g[f"{name}_gradnorm_total"])


def test_schedule():
    g = golden("schedule")
    for i in range(2):
        lr, warmup, total = g[f"cfg{i}"]
        config = Config(lr=lr, warmup=(warmup + 0.5) / total)
        for step, expected in zip(g[f"steps{i}"].tolist(), g[f"lr{i}"]):
            assert llip.schedules(config, step, int(total)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_training_steps():
    """Six steps of the reference loop: schedule, AdamW, decay, and the clamp of the scale."""
    g, data = golden("train_trace"), golden("llip_forward")
    lr, warmup, total = g["lr_cfg"]
    model, config = tiny(lr=float(lr), warmup=(warmup + 0.5) / total, weight_decay=0.2, logit_lr=1.0)
    config = replace(config, lr=float(lr), warmup=(warmup + 0.5) / total, weight_decay=0.2, logit_lr=1.0)
    with torch.no_grad():
        model.logit_scale.fill_(g["start_logit_scale"].item())
    optimizer = llip.make_optimizer(model, config)
    images, tokens = tensor(data["images"]), torch.from_numpy(data["tokens"])[:4]
    for step in range(6):
        rate = llip.schedules(config, step, int(total))
        assert rate == pytest.approx(g["lrs"][step])
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        loss = loss_of(model, images, tokens, config)
        close(loss, g["losses"][step], rtol=1e-3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        close(model.logit_scale[0], g["scale"][step], rtol=1e-3)
        close(model.logit_bias[0], g["bias"][step], rtol=1e-3)
    found = {official(n): p for n, p in model.named_parameters()}
    for name, norm in zip(g["param_names"], g["final_norms"]):
        close(found[name].norm(), norm, rtol=2e-2 if "in_proj_bias" in name else 1e-3)
    close(model.out_proj, g["final_out_proj"], rtol=1e-3, atol=1e-3)
    close(model.visual.class_embedding, g["final_class_embedding"], rtol=1e-3, atol=1e-3)


def distributed_loss(rank, port, results):
    """One of three ranks: the loss of its images against all captions, and the gradients."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    g = golden("distributed_loss")
    leaves = {n: tensor(g[n][rank]).requires_grad_() for n in ("K", "V", "Q", "zt")}
    head = {"out_proj": tensor(g["out_proj"]).requires_grad_()}
    scale = tensor([g["logit_scale"].item()]).requires_grad_()
    head["bias"] = tensor([g["logit_bias"].item()]).requires_grad_()
    image = torch.stack([leaves["K"], leaves["V"]], 1)
    text = torch.stack([leaves["Q"].flatten(1), leaves["zt"]], 1)
    config = Config(mix_heads=2, embedding=8, mixture_tokens=3, tau=float(g["tau"]))
    loss = llip.contrastive_loss(image, text, head | {"scale": scale.exp()}, config, 2000)
    loss.backward()
    shared = {"out_proj": head["out_proj"], "logit_scale": scale, "logit_bias": head["bias"]}
    mean = {}
    for name, x in shared.items():
        dist.all_reduce(x.grad)
        mean[name] = (x.grad / 3).numpy()
    results[rank] = (loss.item(), {n: x.grad.numpy() for n, x in leaves.items()}, mean)
    dist.destroy_process_group()


def test_three_ranks_give_the_reference_loss():
    from helpers import free_port

    g = golden("distributed_loss")
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(distributed_loss, (free_port(), results), nprocs=3)
        for rank in range(3):
            loss, gradients, mean = results[rank]
            close(loss, g["loss_per_rank"][rank], atol=1e-6)
            for name, found in gradients.items():
                close(found, g[f"grad_{name}"][rank], atol=1e-6)
            for name, found in mean.items():
                close(np.squeeze(found), g[f"grad_{name}_mean"], atol=1e-6)


def test_zeroshot():
    g = golden("zeroshot")
    model, config = tiny()
    with torch.no_grad():
        prompts = torch.from_numpy(g["prompt_tokens"])
        text = llip.mean_of_prompts(model.text(prompts.flatten(0, 1)).unflatten(0, prompts.shape[:2]))
        close(text[:, 1], g["text_features"])
        close(text[:, 0].unflatten(1, (4, 4)), g["Q"])
        image, labels = model.image(tensor(g["images"])), torch.from_numpy(g["targets"])
        for i, tau in enumerate(g["temps"].tolist()):
            scores = llip.score(model, image, text, config, ALONE, tau)
            close(scores, g[f"logits_tau{tau}"], atol=1e-5)
            assert llip.zeroshot_metrics(scores, labels)["top1"] == pytest.approx(g["acc"][i])
    scores = tensor(g["logits_tau5"])
    found = llip.zeroshot_metrics(scores, labels)
    assert found["mean_per_class"] == pytest.approx(g["mean_per_class_tau5"].item())
    top3 = 100 * (scores.topk(3).indices == labels[:, None]).any(1).double().mean().item()
    assert [found["top1"], top3] == pytest.approx(g["top1_top5half_tau5"].tolist())
    auc = llip.roc_auc(scores[:, 1] - scores[:, 0], labels % 2 == 1)
    assert auc == pytest.approx(g["roc_auc_first2"].item(), abs=1e-4)


def test_retrieval():
    g = golden("retrieval")
    scores = tensor(g["img"]) @ tensor(g["txt"]).T
    i2t, t2i = llip.retrieval_ranks(scores, torch.arange(12))
    found = llip.rank_metrics(i2t, "image_to_text") | llip.rank_metrics(t2i, "text_to_image")
    expected = dict(zip(g["names"].tolist(), g["values"].tolist()))
    assert found == pytest.approx(expected)
    ranks = llip.retrieval_ranks(tensor(g["multi_scores"], torch.double), torch.from_numpy(g["multi_owner"]))
    for name, values in zip(("i2t", "t2i"), ranks):
        metrics = llip.rank_metrics(values, name)
        for k in (1, 5, 10):
            share = g[f"multi_{name}_R{k}"].item()
            assert metrics[f"{name}_R@{k}"] == pytest.approx(share)


# --------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_is_the_reference_tokenizer():
    g = golden("tokenizer")
    assert llip.BYTE_ORDER == g["byte_order"].tolist()
    assert [ord(llip.BYTE_CHARACTERS[b]) for b in range(256)] == g["byte_chars"].tolist()
    merges = llip.read_merges(GOLDEN / "bpe_tiny.txt.gz")
    tokenizer = llip.Tokenizer(merges, 77)
    assert tokenizer.size == g["tiny_vocab_size"] and len(merges) == 55
    for i, text in enumerate(g["strings"].tolist()):
        assert llip.clean(text) == g["cleaned"][i]
        assert "\x1f".join(llip.split_words(llip.clean(text))) == g["pieces"][i]
        ids = tokenizer.encode(text)
        assert ids == g["tiny_ids"][i, : g["tiny_len"][i]].tolist()
        assert tokenizer.decode(ids) == g["tiny_decoded"][i]


VOCABULARY = Path(os.environ.get("DATA", "data")) / "bpe_simple_vocab_16e6.txt.gz"


@pytest.mark.skipif(not VOCABULARY.is_file(), reason="needs OpenAI's vocabulary file in $DATA")
def test_tokenizer_with_the_real_vocabulary():
    g = golden("tokenizer")
    for context in (77, 16):
        tokenizer = llip.Tokenizer(llip.read_merges(VOCABULARY), context)
        assert tokenizer.size == 49408
        np.testing.assert_array_equal(tokenizer(g["strings"].tolist()), g[f"ids_{context}"])


def test_captions_are_cut_padded_and_counted():
    tokenizer = llip.Tokenizer(llip.read_merges(GOLDEN / "bpe_tiny.txt.gz"), 6)
    rows = tokenizer(["", "the cat on the mat in the hat"])
    assert rows[0].tolist() == [567, 568, 0, 0, 0, 0] and rows[1, 0] == 567 and rows[1, 5] == 568
    assert tokenizer.cut == 1 and rows[1, 1:5].tolist() == tokenizer.encode("the cat on the mat in the hat")[:4]
    plain = llip.Tokenizer(None, 9)
    assert plain.size == 258 and plain(["Ab é"]).tolist() == [[256, 97, 98, 32, 195, 169, 257, 0, 0]]
    assert plain.decode(plain.encode("a red  circle")) == "a red circle"


def test_learned_merges_are_a_vocabulary_file(tmp_path):
    import gzip

    captions = ["low lower lowest", "new newer newest", "wide wider widest"] * 5
    merges = llip.learn_merges(captions, 20)
    assert merges == llip.learn_merges(captions, 20) and "l o" in merges
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress("\n".join(["#version: own", *merges]).encode()))
    ours, read = llip.Tokenizer(merges, 9), llip.Tokenizer(llip.read_merges(tmp_path / "v.txt.gz"), 9)
    assert torch.equal(ours(captions), read(captions)) and ours.size == 514 + len(merges)
    assert len(ours.encode("lowest newer")) < len("lowestnewer")
    assert ours.decode(ours.encode("Lowest newer")) == "lowest newer "


# -------------------------------------------------------------------------------------------------------------- images


def test_transforms_are_the_reference_transforms():
    """Evaluation and training crops as the reference draws and resizes them, from files."""
    g = golden("transforms")
    size = int(g["image_size"])
    for i in range(4):
        Image.fromarray(g[f"im{i}"]).save("x.png")
        pixels, _ = llip.decode("x.png", lambda w, h: llip.centre_box(w, h, size), (size, size))
        expected = tensor(g[f"val{i}"]) * torch.tensor(llip.STD)[:, None, None] + torch.tensor(llip.MEAN)[:, None, None]
        assert (pixels - 255 * expected).abs().max() <= 1.5
        random = torch.Generator().manual_seed(3 + i)
        boxes = []

        def choose(w, h, random=random, boxes=boxes):
            boxes.append(llip.random_crop(w, h, (0.9, 1.0), random))
            return boxes[0]

        pixels, _ = llip.decode("x.png", choose, (size, size), cut=True)
        assert list(boxes[0]) == g[f"train_box_{i}"].tolist()
        assert (pixels.int() - torch.from_numpy(g[f"train_uint8_{i}"]).int()).abs().max() <= 1
    for name, (w, h), seed in (("rrc", g["im0"].shape[1::-1], 3), ("rrc40x36", (40, 36), 53)):
        random = torch.Generator().manual_seed(seed)
        draws = np.array([llip.random_crop(w, h, (0.9, 1.0), random) for _ in range(4000)])
        np.testing.assert_array_equal(draws[:16], g[f"{name}_first16"])
        area = draws[:, 2] * draws[:, 3] / (w * h)
        stats = [*draws.mean(0), area.mean(), area.min(), area.max()]
        np.testing.assert_allclose(stats, g[f"{name}_stats"], rtol=0.02, atol=0.02)
