"""llip.py against the numbers of the reference implementation (tests/golden/llip) and against its own promises."""

import io
import json
import math
import os
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_runs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import free_port, log_rows, on_ranks, run_several
from PIL import Image
from test_runs_old import (  # noqa: F401  run here with this file's `script`
    test_disk_full_keeps_the_previous_checkpoint,
    test_every_preset_can_be_built,
    test_kill_and_resume_is_bitwise,
    test_missing_or_empty_data,
    test_out_of_memory_names_the_flags_that_help,
    test_out_that_holds_a_run_is_refused,
    test_own_checkpoint_is_evaluated_with_its_own_architecture,
    test_resume_starts_from_scratch_where_there_is_nothing,
    test_three_steps_in_a_row_that_are_not_finite_stop_the_run,
)

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
    close(
        llip.pair_scores(k + torch.randn(4, 4, 1, 4), 7 * v, 2 * q, 3 * z, out, 10.0),
        llip.pair_scores(k, v, q, z, out, 5),
    )
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


def test_learned_mix_is_llip_with_one_mix_for_all_captions():
    """Keys that are all alike leave Llip the plain mean, which is where the learned mix starts."""
    config = Config(model="learned")
    learned, other = llip.build(config, 40), llip.build(replace(config, model="llip"), 40)
    other.load_state_dict(learned.state_dict(), strict=False)
    other.k_proj.data.zero_()
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(40, (6, 16))
    close(loss_of(learned, images, tokens, config), loss_of(other, images, tokens, other.config).detach(), atol=1e-5)
    learned.mix.data[:, 3] = 50.0  # all of token 3
    v = torch.einsum("bw,wd->bd", learned.features(images)[:, 3], learned.v_proj[3])
    close(learned.image(images), (v @ learned.out_proj).detach(), atol=1e-4)


def test_all_tokens_are_mixed(tmp_path):
    """With --all-tokens the patches have keys and values of their own, behind those of the class tokens."""
    config = Config(all_tokens=True, mixture_tokens=3)
    model = llip.build(config, 40)
    images = torch.randn(2, 3, 32, 32)
    h = model.visual.ln_post(model.visual.transformer(model.visual.embed(images)))
    assert model.image(images).shape == (2, 2, 4, 3 + 16, 8)
    close(model.image(images)[:, 1, :, 7].flatten(1), (h[:, 7] @ model.v_proj[7]).detach())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    flags = dict(heads=4, text_heads=4, mix_heads=4, tau=3.0)
    again, _, found = llip.load_model(tmp_path / "weights.pt", replace(Config(), **flags), flags)
    assert found.all_tokens and found.mixture_tokens == 3
    close(again.image(images), model.image(images).detach())


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
    g = golden("distributed_loss")
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        on_ranks(distributed_loss, free_port(), results, ranks=3)
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
    words = [llip.to_symbols(piece) for c in captions for piece in c.split()]
    for found in merges:  # by counting all pairs again each time
        pairs = Counter(pair for symbols in words for pair in zip(symbols, symbols[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        assert found == " ".join(best)
        words = [llip.merge(symbols, best) for symbols in words]
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


# ---------------------------------------------------------------------------------------------------------------- runs

SMALL = (
    "--preset toy --width 16 --depth 2 --heads 2 --batch 16 --text-width 16 --text-depth 1 --text-heads 2 --merges 30 "
    "--embedding 16 --mix-heads 2 --mixture-tokens 3 --eval none --log-every 1 --device cpu --no-compile "
    "--precision fp32"
).split()


def write_shard(path, samples):
    """A tar shard of [(member name, bytes), ...]."""
    with tarfile.open(path, "w") as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def picture(i, size=(40, 36), suffix="jpeg"):
    """The bytes of a random image."""
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def make_shards(folder, count=3, each=21):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        members = []
        for i in range(each):
            key = f"{shard:03d}{i:05d}"
            members += [(f"{key}.jpg", picture(1000 * shard + i)), (f"{key}.json", b"{}")]
            members += [(f"{key}.txt", f"picture {i} of {each} in shard {shard}".encode())]
        write_shard(folder / f"{shard:05d}.tar", members)
    return str(folder / f"{{00000..{count - 1:05d}}}.tar")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def script(shards):
    """For the tests of all scripts: data in shards, so that a kill is in the middle of one."""
    flags = [*SMALL, "--data", shards]
    return test_runs.Script(llip, flags, flags, "contrastive_loss", stream=("--buffer", 8))


def weights(out):
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    return state["step"], state["model"]


@pytest.fixture(autouse=True)
def without_target(monkeypatch):
    """The tests of all scripts look for a target network in a checkpoint; this script has none."""
    monkeypatch.setattr(test_runs, "weights", weights)


def main(*flags, code=None):
    """The command line in this process; expect to leave with `code`."""
    return test_runs.here(test_runs.Script(llip, [], [], ""), *flags, code=code)


def refused(capsys, *flags):
    return test_runs.refused(capsys, test_runs.Script(llip, [], [], ""), *flags)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, shards):
    """Runs on two ranks, made by one pair of processes: MODEL, MODEL-shard, MODEL-parts."""
    folder, lines = tmp_path_factory.mktemp("ranks"), []
    for model in ("llip", "clip", "average"):
        flags = ["llip", *SMALL, *FOUR_STEPS, "--data", shards, "--model", model, "--out"]
        lines.append([*flags, folder / model])
        if model == "llip":
            shard = [*flags, folder / "llip-shard", "--shard", "--save-every", "2", "--val-data", shards]
            lines += [shard, [*shard, "--resume", "--eval", "retrieval"]]
            lines.append([*flags, folder / "llip-parts", "--accumulate", "2"])
    run_several(*lines, ranks=2)
    return folder


# AdamW's first steps turn rounding into signs where a gradient is near 0: a small lr keeps that out of the losses
FOUR_STEPS = "--steps 4 --lr 1e-5 --flip --crop-scale 0.5 1".split()


@pytest.mark.parametrize("model", ["llip", "clip", "average"])
def test_two_ranks_and_accumulation_are_one_process(model, on_two_ranks, shards):
    """Same losses, gradients, weights: two ranks, FSDP2, batches encoded in parts, and all of them together."""
    flags = [*SMALL, *FOUR_STEPS, "--data", shards, "--model", model]
    main(*flags, "--out", "one", "--val-data", shards, "--eval", "retrieval")
    main(*flags, "--out", "parts", "--accumulate", 4)
    others = [Path("parts"), on_two_ranks / model]
    if model == "llip":
        others += [on_two_ranks / "llip-shard", on_two_ranks / "llip-parts"]
    for other in others:
        test_runs.assert_same("one", other, tolerance=1e-5, without=("in_proj_bias",))
        rows = [r for r in log_rows("one") if "loss" in r], [r for r in log_rows(other) if "loss" in r]
        assert len(rows[0]) == len(rows[1]) == 4
        for a, b in zip(*rows):
            tolerance = 1e-5 if a["step"] == 1 else 5e-5
            assert b["loss"] == pytest.approx(a["loss"], rel=tolerance)
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=tolerance)
    if model == "llip":
        one, shard = (log_rows(out)[-1]["eval"]["trained"] for out in ("one", on_two_ranks / "llip-shard"))
        assert shard == pytest.approx(one, abs=0.2)


def test_half_batches_without_their_negatives_are_another_loss(shards):
    """What --accumulate would be if it averaged the losses of its parts."""
    model, config = tiny()
    g = golden("llip_forward")
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])[:4]
    whole = loss_of(model, images, tokens, config)
    halves = [loss_of(model, i, t, config) for i, t in zip(images.chunk(2), tokens.chunk(2))]
    assert abs(whole - sum(halves) / 2) > 0.1
    whole.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    config = replace(config, accumulate=2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    close(llip.accumulated_backward(model, images, tokens, config, 2**20, scaler), whole.item(), atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_in_the_middle_of_a_shard_is_bitwise(shards, monkeypatch, workers):
    flags = [*SMALL, "--data", shards, "--steps", 9, "--save-every", 1, "--buffer", 10, "--workers", workers]
    main(*flags, "--out", "whole")
    schedules = llip.schedules

    def killed(config, step, steps):
        if step == 5:
            raise KeyError("killed")
        return schedules(config, step, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(llip, "schedules", killed)
        main(*flags, "--out", "killed")
    assert weights("killed")[0] == 5
    main(*flags, "--out", "killed", "--resume")
    test_runs.assert_same("whole", "killed")


def test_number_of_workers_changes_nothing(shards, tmp_path):
    for data in (shards, test_runs.photographs(tmp_path / "photos")):
        for workers in (0, 2):
            flags = ["--data", data, "--steps", 3, "--workers", workers, "--cache", 0, "--buffer", 10]
            main(*SMALL, *flags, "--out", f"w{workers}-{len(str(data))}")
        test_runs.assert_same(*(f"w{workers}-{len(str(data))}" for workers in (0, 2)))


def test_the_stream_of_shards(shards, tmp_path):
    """Every sample once an epoch, windows shuffled, neighbours from one shard, another order in the next epoch."""
    log, config = Log("out", ALONE), Config(buffer=8)
    data = llip.Shards([Path(p) for p in llip.expand_braces(shards)], log, config)
    assert len(data) == 63
    first, second = (data.positions(63 * e, 63 * (e + 1), 0).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(63)) and first != second and first != sorted(first)
    assert first[10:30] == data.positions(10, 30, 0).tolist()
    for window in range(0, 63, 8):
        assert len({i // 21 for i in first[window : window + 8]}) <= 2, "a window is nearly sequential"
    image, caption = data.sample(43)
    assert caption == "picture 1 of 21 in shard 2" and image.getvalue() == picture(2001)
    (Path(shards).parent / "sizes.json").write_text(json.dumps({f"{i:05d}.tar": 22 for i in range(3)}))
    try:
        listed = llip.Shards([Path(p) for p in llip.expand_braces(shards)], log, config)
        assert len(listed) == 66 and listed.sample(22)[1] == "picture 0 of 21 in shard 1"
        with pytest.raises(OSError, match="sizes.json"):
            listed.sample(21)
    finally:
        (Path(shards).parent / "sizes.json").unlink()


def test_bad_shard_members_are_skipped_counted_and_limited(tmp_path, capsys):
    """A text that is no image, an empty image, an empty caption, a missing caption, a shard that is cut off."""
    make_shards(tmp_path / "s", count=2, each=40)
    good = [(f"{i:03d}.{s}", d) for i in range(40) for s, d in (("png", picture(i, suffix="png")), ("txt", b"fine"))]
    bad = [("a.jpg", b"text"), ("a.txt", b"no image"), ("b.jpg", b""), ("b.txt", b"empty image"), ("c.jpg", picture(1))]
    bad += [("c.txt", b" \n"), ("d.jpg", picture(2)), ("e.txt", b"no image at all")]
    write_shard(tmp_path / "s" / "00002.tar", good + bad)
    whole = (tmp_path / "s" / "00001.tar").read_bytes()
    (tmp_path / "s" / "00001.tar").write_bytes(whole[: len(whole) // 2 + 300])
    flags = [*SMALL, "--data", tmp_path / "s", "--steps", 12, "--buffer", 16, "--workers", 1]
    main(*flags, "--max-bad", 0.2, "--out", "tolerant")
    printed = capsys.readouterr().out
    for words in ("00002.tar, d: no caption", "00002.tar, e: no image", "00002.tar, b: empty image"):
        assert printed.count(words) == 1, printed
    for words in ("00002.tar, c: empty caption", "cannot identify image file", "00001.tar"):
        assert words in printed, printed
    main(*flags, "--out", "strict", code=2)
    assert "--max-bad" in capsys.readouterr().err
    write_shard(tmp_path / "none.tar", bad[-2:])
    main(*SMALL, "--data", tmp_path / "none.tar", "--steps", 1, "--max-bad", 1, code=2)
    assert "no image with a .txt" in capsys.readouterr().err
    assert "2 of the 3 shards" in refused(capsys, "--data", str(tmp_path / "s" / "{00002..00004}.tar"))


def test_captions_files(tmp_path):
    """Every layout gives the same images with the same captions, in the same order."""
    expected = {"a.jpg": ["one, two", "three"], "b.jpg": ["four"]}
    images = [dict(id=i, file_name=n) for i, n in enumerate(expected)]
    notes = [dict(image_id=i, caption=c) for i, those in enumerate(expected.values()) for c in those]
    (tmp_path / "captions_train.json").write_text(json.dumps(dict(images=images, annotations=notes)))
    karpathy = [
        dict(filename=n, split="train", sentences=[dict(raw=c) for c in those]) for n, those in expected.items()
    ]
    karpathy[1]["split"] = "restval"
    karpathy += [dict(filename="c.jpg", split="test", filepath="sub", sentences=[dict(raw="five")])]
    (tmp_path / "dataset.json").write_text(json.dumps(dict(images=karpathy)))
    rows = [(n, i, c) for n, those in expected.items() for i, c in enumerate(those)]
    (tmp_path / "results.token").write_text("".join(f"{n}#{i}\t{c}\n" for n, i, c in rows))
    lines = "".join(f"{n}| {i}| {c}\n" for n, i, c in rows)
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n" + lines)
    (tmp_path / "open.tsv").write_text("filepath\ttitle\n" + "".join(f"{n}\t{c}\n" for n, _, c in rows))
    (tmp_path / "open.csv").write_text("title,filepath\n" + "".join(f'"{c}",{n}\n' for n, _, c in rows))
    (tmp_path / "conceptual.tsv").write_text("".join(f"{c}\t{n}\n" for n, _, c in rows))
    log = Log("out", ALONE)
    for name in (
        "captions_train.json",
        "dataset.json",
        "results.token",
        "results.csv",
        "open.tsv",
        "open.csv",
        "conceptual.tsv",
    ):
        split = llip.open_data(Config(data=str(tmp_path / name)), "train", log)
        assert split.paths == list(expected), name
        assert [split.captions(i) for i in range(2)] == list(expected.values()), name
    val = llip.open_data(Config(data=str(tmp_path / "dataset.json")), "val", log)
    assert val.paths == ["sub/c.jpg"] and val.captions(0) == ["five"]
    some = split.subset(torch.tensor([1, 0]))
    assert [some.captions(i) for i in range(2)] == [["four"], ["one, two", "three"]]
    chosen = split.choose(torch.tensor([0, 0, 1]), torch.tensor([0.1, 0.9, 0.9]))
    assert [split.table[i] for i in chosen] == ["one, two", "three", "four"]


def test_images_without_captions(tmp_path, capsys):
    """With .txt files beside them: those without are left out, counted and limited; none at all: an error."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02d}.jpg").write_bytes(picture(i))
    assert "no captions" in refused(capsys, *SMALL, "--data", folder, "--steps", 1)
    for i in range(23):
        (folder / f"{i:02d}.txt").write_text(f"picture {i}\n\nnumber {i}\n")
    main(*SMALL, "--data", folder, "--steps", 2, "--out", "out")
    printed = capsys.readouterr().out
    assert f"{folder / '23.jpg'}: no caption" in printed and "23 images" in printed
    (folder / "21.txt").write_text("\n")
    assert "--max-bad" in refused_late(capsys, *SMALL, "--data", folder, "--steps", 2)
    (tmp_path / "wrong.json").write_text("{}")
    assert "layouts" in refused(capsys, *SMALL, "--data", tmp_path / "wrong.json", "--steps", 1)
    (tmp_path / "web.tsv").write_text("a dog\thttp://x.org/1.jpg\n")
    assert "download" in refused(capsys, *SMALL, "--data", tmp_path / "web.tsv", "--steps", 1)
    (tmp_path / "lost.tsv").write_text("a dog\t1.jpg\n")
    assert "--images" in refused(capsys, *SMALL, "--data", tmp_path / "lost.tsv", "--images", tmp_path / "no")


def refused_late(capsys, *flags):
    """As `refused`, where skipped files are named before."""
    main(*flags, code=2)
    return capsys.readouterr().err


def test_corrupt_images_are_skipped_counted_and_limited(tmp_path, capsys):
    data = test_runs.photographs(tmp_path / "photos", count=200, size=(40, 40))
    broken = [data / "train" / "cat" / "0.jpg", data / "train" / "dog" / "1.jpg"]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    broken[1].write_bytes(b"")
    flags = [*SMALL, "--data", data, "--steps", 15, "--workers", 1, "--no-baselines"]
    for name, cache in (("streamed", 0), ("cached", 2)):
        main(*flags, "--cache", cache, "--out", name, "--eval", "zeroshot,linear,retrieval")
        printed = capsys.readouterr().out
        assert all(f"skipped an unreadable file: {path}" in printed for path in broken)
        assert {"top1", "mean_per_class", "auc", "linear", "i2t_R@1"} <= log_rows(name)[-1]["eval"]["trained"].keys()
    for i in range(2, 8):
        (data / "train" / ("cat", "dog")[i % 2] / f"{i}.jpg").write_bytes(b"")
    for cache in (0, 2):
        main(*flags, "--cache", cache, "--steps", 40, code=2)
        assert "--max-bad" in capsys.readouterr().err


def test_a_step_that_is_not_finite_is_not_applied(script, monkeypatch):
    """The weights after a poisoned third step are those after the second, and training goes on."""
    flags = [*script.small, "--save-every", "1"]
    monkeypatch.setattr(llip, "schedules", lambda config, step, steps: 1e-3)
    main(*flags, "--out", "two", "--steps", 2)
    test_runs.poison(monkeypatch, script, lambda step: step == 3, float("nan"))
    main(*flags, "--out", "three", "--steps", 3)
    rows = log_rows("three")
    assert not np.isfinite(rows[2]["loss"]) and np.isfinite(rows[1]["loss"])
    (_, two), (_, three) = weights("two"), weights("three")
    for name, value in two.items():
        assert torch.equal(value, three[name]), name
    main(*flags, "--out", "three", "--steps", 4, "--resume")
    _, three = weights("three")
    assert any(not torch.equal(v, three[n]) for n, v in two.items())


def test_checkpoints_that_are_none(script, capsys):
    main(*script.small, "--steps", 1, "--out", "good")
    good, whole = torch.load("good/last.pt", weights_only=True), Path("good/last.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    Path("text.pt").write_text("hello")
    torch.save({"script": "another", "model": {}}, "other.pt")
    torch.save({"weights": torch.zeros(3)}, "strange.pt")
    torch.save(os.system, "code.pt")
    good["model"].pop("visual.ln_pre.weight")
    torch.save(good, "gap.pt")
    errors = dict(cut="truncated", text="not a checkpoint", other="another", strange="but weights", code="safely",
                  gap="missing: visual.ln_pre.weight", absent="no checkpoint at")  # fmt: skip
    for name, words in errors.items():
        assert words in refused(capsys, "--init", f"{name}.pt", "--eval", "features", "--out", name)
    wider = [*script.small, "--steps", 2, "--out", "good", "--resume", "--width", 32]
    assert "--width 16" in refused(capsys, *wider)
    official = GOLDEN / "llip_tiny.pt"
    assert "--heads" in refused(capsys, "--init", official, "--eval", "features")
    heads = "--heads 4 --text-heads 2 --mix-heads 4 --tau 5 --eval features".split()
    assert "--vocabulary" in refused(capsys, "--init", official, *heads)
    vocabulary = ["--vocabulary", GOLDEN / "bpe_tiny.txt.gz"]
    assert "token_embedding" in refused(capsys, "--init", official, *heads, *vocabulary)
    assert "no vocabulary at" in refused(capsys, *SMALL, "--vocabulary", "none.txt.gz")
    Path("v.txt.gz").write_text("hello")
    assert "no vocabulary file" in refused(capsys, *SMALL, "--vocabulary", "v.txt.gz")


def test_released_weights_in_features_out(tmp_path, capsys):
    """A released layout through --init, with a vocabulary of its size: features, zero-shot, another resolution."""
    import gzip

    state = torch.load(GOLDEN / "llip_tiny.pt", weights_only=True)
    table = next(k for k in state["state_dict"] if k.endswith("token_embedding.weight"))
    state["state_dict"][table] = torch.randn(516, 12)
    torch.save(state, "released.pt")
    Path("v.txt.gz").write_bytes(gzip.compress(b"#version\na b\nt h"))
    data = test_runs.photographs(tmp_path / "photos", count=6, size=(24, 24), suffix="png")
    flags = (
        "--init released.pt --heads 4 --text-heads 2 --mix-heads 4 --tau 5 --vocabulary v.txt.gz --device cpu".split()
    )
    main(*flags, "--data", data, "--eval", "features,zeroshot", "--tokens", "--eval-taus", 1, 8, "--out", "one")
    found = np.load("one/features.npz")
    model, _, config = llip.load_model("released.pt", replace(Config(), **FLAGS["llip_tiny"]), FLAGS["llip_tiny"])
    pixels = np.stack([np.asarray(Image.open(data / p)) for p in found["paths"]])
    images = llip.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found["tokens"], model.visual(images), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["features"], axis=1), 1, atol=1e-5)
    assert found["features"].shape == (6, 16) and found["labels"].dtype == np.int64
    assert "top1, tau 8" in log_rows("one")[-1]["eval"]["trained"]
    main(*flags, "--data", data, "--eval", "features", "--image-size", 48, "--out", "large")
    assert "interpolated from 3x3 to 6x6" in capsys.readouterr().out
    main(*flags, "--data", data, "--steps", 2, "--batch", 4, "--lr", 0, "--eval", "none", "--out", "tuned")
    close(weights("tuned")[1]["out_proj"], state["state_dict"]["_orig_mod.module.pred.out_proj"])


SETTINGS = [
    ("--batch 10 --accumulate 3", "--batch"), ("--image-size 30", "--patch"), ("--width 66", "heads"),
    ("--embedding 33", "--mix-heads"), ("--wdith 32", "--width"), ("--preset folde", "folder"), 
    ("--eval knnn", "kinds"),
    ("--precision fp8", "bf16"), ("--device tpu", "device"), ("--model blip", "siglip"), ("--tau 0", "--tau"),
    ("--logit-bias often", "auto"), ("--context 2", "--context"), ("--shard --precision fp16", "bf16"),
]  # fmt: skip


def test_settings_that_cannot_work(capsys):
    for flags, words in SETTINGS:
        assert words in refused(capsys, *flags.split()), flags
        assert not Path("runs").exists(), "refused before any work"


def test_help_lists_every_flag_with_meaning_and_default(capsys):
    main("--help", code=0)
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in printed for name in vars(Config())) and "[128]" in printed


def test_presets_are_the_papers():
    """Numbers of parameters follow from widths, depths, heads and mixture tokens."""
    expected = dict(vit_b32=(768, 12), vit_b16=(768, 12), vit_l14=(1024, 16), vit_h14=(1280, 16), vit_g14=(1664, 16))
    for name, (width, heads) in expected.items():
        config = Config(**llip.PRESETS[name])
        with torch.device("meta"):
            model = llip.Llip(config, 49408)
        assert model.visual.class_embedding.shape == (config.mixture_tokens, width) and config.heads == heads
        assert model.out_proj.shape == (config.embedding,) * 2
        assert llip.schedules(config, 1999, config.steps) == pytest.approx(config.lr)


# ------------------------------------------------------------------------------------------------------------ learning


def test_toy_world_says_what_is_there():
    """Facts are true of the pixels: a place names the colour that is found in this quarter."""
    split, facts = llip.toy_world("val", 32)
    colours = torch.tensor(list(llip.COLOURS.values())).float()
    right = total = 0
    for i in range(100):
        for fact in facts[i]["place"]:
            place = next(p for p in llip.PLACES if fact.startswith(p))
            colour = fact.removeprefix(place).split()[0]
            row, column = divmod(llip.PLACES.index(place), 2)
            quarter = split.pixels[i, :, 16 * row :, 16 * column :][:, :16, :16].float().flatten(1).T
            bright = quarter[quarter.amax(1) > 130]
            nearest = torch.cdist(bright, colours).argmin(1).mode().values
            right, total = right + (list(llip.COLOURS)[nearest] == colour), total + 1
        assert facts[i]["count"] == [llip.COUNTS[len(facts[i]["place"])]]
    assert right / total > 0.97
    captions = split.captions(0)
    assert len(set(captions)) == len(captions) > 15
    for relation in facts[0]["relation"]:
        a, how, b = next(
            (relation.partition(f" {w} ") for w in ("left of", "right of", "above", "below") if w in relation)
        )
        assert a in facts[0]["object"] and b in facts[0]["object"]


@pytest.mark.parametrize("model", ["llip", "clip"])
def test_overfits_a_few_pairs(model):
    """32 pairs are told apart after a few hundred steps: loss near 0, retrieval perfect, both ways."""
    torch.manual_seed(0)
    config = Config(model=model, batch=32, width=32, depth=2, heads=2, text_width=32, embedding=32, tau=3.0, context=6)
    net = llip.build(config, 40)
    images, tokens = torch.randn(32, 3, 32, 32), torch.randint(1, 38, (32, 6))
    tokens[:, 5] = 39
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(200):
        loss = loss_of(net, images, tokens, config, 2**24)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = llip.score(net, net.image(images), net.text(tokens), config, ALONE)
    ranks = llip.retrieval_ranks(scores, torch.arange(32))
    assert loss < 1 and all((r == 0).all() for r in ranks)


def test_llip_learns():
    """In a minute, on the toy scenes: captions are found again, and by their own mix of tokens, not by all alike."""
    flags = "--preset toy --steps 400 --batch 64 --mixture-tokens 4 --eval retrieval --device cpu --no-compile"
    main(*flags.split(), "--out", "learnt")
    results = log_rows("learnt")[-1]["eval"]
    trained, mean, random = (results[column]["i2t_R@10"] for column in ("trained", "mean token", "random"))
    assert trained > 12 and trained > 2 * mean and random < 4, results  # three seeds gave 28 to 60, 6 to 15 and 1


def test_picture_shows_what_captions_look_at():
    config = Config()
    model, tokenizer = llip.build(config, 258), llip.Tokenizer(None, 16)
    split, facts = llip.toy_world("val", 32)
    images = llip.normalize(split.pixels[:3])
    maps = llip.token_maps(model.visual, images)
    assert maps.shape == (3, 8, 4, 4)
    close(maps.sum((2, 3)), torch.ones(3, 8))
    picture = llip.draw_picture(model, tokenizer, images, [f["place"] for f in facts[:3]], config)
    assert len(np.unique(np.asarray(picture))) > 50


def test_recomputed_activations_give_the_same_gradients():
    model, config = tiny()
    g = golden("llip_forward")
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])[:4]
    found = []
    for again in (False, True):
        model.visual.transformer.recompute = model.transformer.recompute = again
        found.append(torch.autograd.grad(loss_of(model, images, tokens, config), list(model.parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_prompts_and_names_of_classes(tmp_path):
    """Prompts and synonyms that the user gives; the data sets' own have the published numbers."""
    assert len(set(llip.CIFAR10_PROMPTS)) == 18 and len(set(llip.IMAGENET_PROMPTS)) == 80
    assert llip.prompts_of(Config(val_data="imagenet")) is llip.IMAGENET_PROMPTS
    (tmp_path / "prompts.txt").write_text("a {}.\n\nno place for it\nmy {}\n")
    (tmp_path / "names.json").write_text(json.dumps(["cat", ["dog", "puppy"]]))
    config = Config(templates=str(tmp_path / "prompts.txt"), class_names=str(tmp_path / "names.json"))
    split = llip.Split(None, ["0", "1", "2"], torch.tensor([1, 0, 1]), ["x", "y"])
    split = llip.with_class_captions(split, config)
    assert split.captions(1) == ["a cat.", "my cat"]
    assert split.captions(0) == split.captions(2) == ["a dog.", "my dog", "a puppy.", "my puppy"]
    assert split.subset(torch.tensor([2])).captions(0) == split.captions(2)
    assert llip.names_of(["great_white_shark"], Config()) == [["great white shark"]]
