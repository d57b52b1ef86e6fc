"""llip.py against the reference's numbers (tests/golden/llip) and its own promises."""

import csv
import gzip
import io
import json
import math
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import free_port, log_rows, on_ranks
from PIL import Image
from test_runs import SCRIPTS, assert_same, here, learn, photographs, refused, weights

import common
import llip
from llip import Config

GOLDEN = Path(__file__).parent / "golden" / "llip"
SCRIPT = SCRIPTS["llip"]
FLAGS = {
    "llip_tiny": {"heads": 4, "text_heads": 2, "mix_heads": 4, "tau": 5.0},
    "llip_tiny_norm_legacy": {"heads": 2, "text_heads": 3, "mix_heads": 2, "tau": 5.0},
}


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=2e-5, rtol=1e-4):
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected, torch.float64), atol=atol, rtol=rtol)


def load(path, **known):
    """Return (model, config) of a checkpoint; known: what the file cannot tell."""
    state = llip.read_weights(path, known)
    config = replace(Config(), **{**state["fields"], **known})
    model = llip.build(config, len(state["model"]["token_embedding.weight"]))
    llip.load_weights(model, state, path)
    return model, config


def tiny(name="llip_tiny"):
    """Return (model, config) of a golden checkpoint."""
    return load(GOLDEN / f"{name}.pt", **FLAGS[name])


def pieces(model, images, tokens):
    """Return (k, v, q, z') as the golden files have them."""
    k, v = model.image(images).unbind(1)
    q, z = model.text(tokens).unbind(1)
    return k, v, q.unflatten(1, (k.shape[1], -1)), z


def official(name):
    """Return the released name of one of our parameters."""
    return "pred.out_proj" if name == "out_proj" else name


def loss_of(model, images, tokens):
    return model(images, tokens)


# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", FLAGS)
def test_towers_and_head(name):
    g = golden("llip_forward" + "_norm" * ("norm" in name))
    model, config = tiny(name)
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])
    x = model.visual.embed(images)
    close(x, g["vis_ln_pre"])
    close(model.visual.transformer.resblocks[0](x), g["vis_block0"])
    close(model.visual(images), g["vis_tokens"])
    close(model.encode_tokens(tokens), g["text_hidden"])
    k, v, q, z = pieces(model, images, tokens)
    for ours, theirs in ((k, "K"), (v, "V"), (q, "Q"), (z, "zt")):
        close(ours, g[theirs])
    mix = llip.mixing_weights(k, q, 5).permute(1, 3, 0, 2)  # [B, T, H, K]
    close(mix, g["attn_tau5"])
    close(torch.einsum("bthk,bhkd->bthd", mix, v).flatten(2) @ model.out_proj, g["z_tau5"])
    for tau in (1, 5, 8):
        scores = llip.pair_scores(k, v, q, z, model.out_proj, tau)
        close(scores, g[f"cos_tau{tau}"], atol=1e-5)
    close(llip.pair_scores(k, v, q, z, model.out_proj, 5), g["f64_cos"], atol=1e-5)
    assert config.mix_norm == ("norm" in name)


@pytest.mark.parametrize("pairs", [1, 5, 10**6])
@pytest.mark.parametrize("name", FLAGS)
def test_loss_and_gradients(name, pairs, monkeypatch):
    """In tiles of one pair, of a few, and of all."""
    monkeypatch.setattr(llip, "pairs_in_tile", lambda k, z_text: pairs)
    g = golden("llip_forward" + "_norm" * ("norm" in name))
    model, config = tiny(name)
    n = len(g["logits_tau5"])
    images, tokens = tensor(g["images"])[:n], torch.from_numpy(g["tokens"])[:n]
    k, v, q, z = pieces(model, images, tokens)
    scores = llip.pair_scores(k, v, q, z, model.out_proj, 5)
    close(model.logit_scale.exp() * scores + model.logit_bias, g["logits_tau5"], atol=5e-5)
    loss = loss_of(model, images, tokens)
    close(loss, g["loss_tau5"], atol=5e-5)
    close(loss, g["f64_loss"], atol=5e-5)
    loss.backward()
    found = {official(n): p.grad for n, p in model.named_parameters()}
    assert set(found) == set(g["grad_names"])
    for parameter, norm in zip(g["grad_names"], g["grad_norms"], strict=True):
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
        left = {id(p) for g in groups if not g["decay"] for p in g["params"]}
        names = {official(n) for n, p in model.named_parameters() if id(p) in left}
        expected = golden("llip_forward" + "_norm" * ("norm" in name))["no_decay_names"]
        assert names == set(expected)
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 4, 8, 64), (17, 8, 64, 32), (40, 1, 3, 16)])
def test_tiles_equal_the_naive_form(shape, dtype):
    """Loss and gradients, also where true pairs lie off the diagonal; images [n, H, K, D/H]."""
    n, heads, tokens, width = shape
    torch.manual_seed(0)
    shapes = [(n, heads, tokens, width // heads)] * 2
    shapes += [(n + 5, heads, width // heads), (n + 5, width), (width, width), (1,), (1,)]
    inputs = [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
    k, v, q, z_text, out, scale, bias = inputs
    mix = torch.einsum("bhkd,thd->bthk", k, q).div(2.0).softmax(-1)
    z = torch.einsum("bthk,bhkd->bthd", mix, v).flatten(2) @ out
    scores = F.cosine_similarity(z, z_text, dim=2, eps=1e-12)
    y = -torch.ones(n, n + 5, dtype=dtype)
    y[range(n), range(3, n + 3)] = 1
    naive = -F.logsigmoid(y * (scale * scores + bias)).sum()
    expected = torch.autograd.grad(naive, inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for side in (3, 8, 64):
        found = llip.PairLoss.apply(side, 3, 2.0, *inputs)
        assert (found - naive).abs() <= tolerance * naive
        for ours, theirs in zip(torch.autograd.grad(found, inputs), expected, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_pair_loss_takes_half_precision_and_scaled_gradients():
    model, config = tiny()
    g = golden("llip_forward")
    with torch.no_grad():
        image = model.image(tensor(g["images"]))
        text = model.text(torch.from_numpy(g["tokens"])[:4])
    image = image.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = llip.contrastive_loss(image, text, model)
    (1024 * loss).backward()
    exact = image.detach().float().requires_grad_()
    llip.contrastive_loss(exact, text, model).backward()
    assert loss.dtype == torch.float32 and image.grad.dtype == torch.bfloat16
    torch.testing.assert_close(image.grad.float() / 1024, exact.grad, rtol=1e-2, atol=1e-6)


def test_invariances_of_mixing():
    model, _ = tiny()
    g = golden("llip_forward")
    with torch.no_grad():
        k, v, q, z = pieces(model, tensor(g["images"]), torch.from_numpy(g["tokens"]))
    out = model.out_proj.detach()
    scores = llip.pair_scores(k, v, q, z, out, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(llip.pair_scores(k[:, :, order], v[:, :, order], q, z, out, 5), scores)
    shifted = k + torch.randn(4, 4, 1, 4)
    close(llip.pair_scores(shifted, 7 * v, 2 * q, 3 * z, out, 10.0), scores)
    uniform = F.normalize(v.mean(2).flatten(1) @ out, dim=-1) @ F.normalize(z, dim=-1).T
    close(llip.pair_scores(k, v, q, z, out, 1e9), uniform)
    assert (scores - uniform).abs().max() > 0.01


def test_one_mixture_token_is_siglip():
    """With K = 1 the caption has no choice: SigLIP with the projection v_proj @ out_proj."""
    config = Config(mixture_tokens=1)
    baseline = replace(config, model="siglip")
    one, other = llip.build(config, 40), llip.build(baseline, 40)
    shared = {k: v for k, v in one.state_dict().items() if k in other.state_dict()}
    shared["visual.proj"] = one.v_proj[0].detach() @ one.out_proj.detach()
    other.load_state_dict(shared)
    images, tokens = torch.randn(6, 3, 32, 32), torch.randint(40, (6, 16))
    expected = loss_of(other, images, tokens)
    close(loss_of(one, images, tokens), expected.detach(), atol=1e-5)


def test_all_parameters_get_gradients():
    for name in ("llip", "siglip", "clip"):
        config = Config(model=name)
        model = llip.build(config, 40)
        loss_of(model, torch.randn(6, 3, 32, 32), torch.randint(40, (6, 16))).backward()
        for parameter, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", ["clip_gelu", "siglip"])
def test_baselines(name, tmp_path):
    g = golden("baselines")
    state = {k.removeprefix("sd/ncls1/"): tensor(g[k]) for k in g.files if "ncls1/" in k}
    if name == "clip_gelu":
        state.pop("logit_bias")
        state.update(input_resolution=torch.tensor(12), vocab_size=torch.tensor(33))
    torch.save(state, tmp_path / "weights.pt")
    known = {"heads": 2, "text_heads": 2, "quick_gelu": name != "clip_gelu"}
    model, config = load(tmp_path / "weights.pt", **known)
    assert config.model == name.removesuffix("_gelu")
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])
    close(model.image(images), g[f"{name}_image"])
    close(model.text(tokens)[:, 0], g[f"{name}_text"])
    loss = loss_of(model, images, tokens)
    close(loss, g[f"{name}_loss"], atol=5e-5)
    loss.backward()
    close(model.logit_scale.grad.sum(), g[f"{name}_grad_scale"], atol=1e-6)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    close(norm, g[f"{name}_gradnorm_total"])


def test_schedule():
    g = golden("schedule")
    for i in range(2):
        lr, warmup, total = g[f"cfg{i}"]
        config = Config(lr=lr, warmup=(warmup + 0.5) / total)
        for step, expected in zip(g[f"steps{i}"].tolist(), g[f"lr{i}"], strict=True):
            found = llip.schedules(config, step, int(total))
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_training_steps():
    """Six steps of the reference loop: schedule, AdamW, decay, and the clamp of the scale."""
    g, data = golden("train_trace"), golden("llip_forward")
    lr, warmup, total = g["lr_cfg"]
    model, config = tiny()
    config = replace(config, lr=float(lr), warmup=(warmup + 0.5) / total)
    with torch.no_grad():
        model.logit_scale.fill_(g["start_logit_scale"].item())
    optimizer = llip.make_optimizer(model, config)
    images, tokens = tensor(data["images"]), torch.from_numpy(data["tokens"])[:4]
    for step in range(6):
        rate = llip.schedules(config, step, int(total))
        assert rate == pytest.approx(g["lrs"][step])
        common.set_rates(optimizer, rate, 0.2)
        loss = loss_of(model, images, tokens)
        close(loss, g["losses"][step], rtol=1e-3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        close(model.logit_scale[0], g["scale"][step], rtol=1e-3)
        close(model.logit_bias[0], g["bias"][step], rtol=1e-3)
    found = {official(n): p for n, p in model.named_parameters()}
    for name, norm in zip(g["param_names"], g["final_norms"], strict=True):
        close(found[name].norm(), norm, rtol=2e-2 if "in_proj_bias" in name else 1e-3)
    close(model.out_proj, g["final_out_proj"], rtol=1e-3, atol=1e-3)
    expected = g["final_class_embedding"]
    close(model.visual.class_embedding, expected, rtol=1e-3, atol=1e-3)


def distributed_loss(rank, port, results):
    """Be one of three ranks: the loss of its images against all captions, and the gradients."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank))
    os.environ["WORLD_SIZE"] = "3"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    g = golden("distributed_loss")
    leaves = {n: tensor(g[n][rank]).requires_grad_() for n in ("K", "V", "Q", "zt")}
    head = {"out_proj": tensor(g["out_proj"])}
    head.update({n: tensor([g[n].item()]) for n in ("logit_scale", "logit_bias")})
    model = llip.build(Config(mix_heads=2, tau=float(g["tau"])), 40)
    for name, x in head.items():
        head[name] = torch.nn.Parameter(x)
        setattr(model, name, head[name])
    image = torch.stack([leaves["K"], leaves["V"]], 1)
    text = torch.stack([leaves["Q"].flatten(1), leaves["zt"]], 1)
    llip.pairs_in_tile = lambda k, z_text: 9
    loss = llip.contrastive_loss(image, text, model)
    loss.backward()
    mean = {}
    for name, x in head.items():
        dist.all_reduce(x.grad)
        mean[name] = (x.grad / 3).numpy()
    results[rank] = (loss.item(), {n: x.grad.numpy() for n, x in leaves.items()}, mean)
    dist.destroy_process_group()


def test_three_ranks_give_the_reference_loss():
    g = golden("distributed_loss")
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        on_ranks(distributed_loss, free_port(), results, ranks=3, timeout=200)
        for rank in range(3):
            loss, gradients, mean = results[rank]
            close(loss, g["loss_per_rank"][rank], atol=1e-6)
            for name, found in gradients.items():
                close(found, g[f"grad_{name}"][rank], atol=1e-6)
            for name, found in mean.items():
                close(np.squeeze(found), g[f"grad_{name}_mean"], atol=1e-6)


def test_zeroshot():
    g = golden("zeroshot")
    model, _ = tiny()
    with torch.no_grad():
        prompts = torch.from_numpy(g["prompt_tokens"])
        text = torch.stack([llip.mean_of_prompts(model.text(tokens)) for tokens in prompts])
        close(text[:, 1], g["text_features"])
        close(text[:, 0].unflatten(1, (4, 4)), g["Q"])
        labels = torch.from_numpy(g["targets"])
        images = (tensor(g["images"]) - llip.SHIFT) / llip.SCALE  # as common normalises
        for i, tau in enumerate(g["temps"].tolist()):
            model.tau = tau
            scores = llip.score(model, text, images)
            close(scores, g[f"logits_tau{tau}"], atol=1e-5)
            assert llip.zeroshot(scores, labels)["top1"] == pytest.approx(g["acc"][i])
    scores = tensor(g["logits_tau5"])
    true = F.one_hot(labels, scores.shape[1]).bool()
    found = list(llip.recall(scores, true, "top", (1, 3)).values())
    assert found == pytest.approx(g["top1_top5half_tau5"].tolist())


def test_retrieval():
    g = golden("retrieval")
    same = torch.eye(12, dtype=torch.bool)
    found = llip.retrieval(tensor(g["img"]) @ tensor(g["txt"]).T, same)
    expected = dict(zip(g["names"].tolist(), g["values"].tolist(), strict=True))
    for k in (1, 5, 10):
        assert found[f"i2t R@{k}"] == pytest.approx(100 * expected[f"image_to_text_R@{k}"])
        assert found[f"t2i R@{k}"] == pytest.approx(100 * expected[f"text_to_image_R@{k}"])
    scores, owner = tensor(g["multi_scores"], torch.double), torch.from_numpy(g["multi_owner"])
    found = llip.retrieval(scores, owner == torch.arange(12)[:, None])
    for name in ("i2t", "t2i"):
        for k in (1, 5, 10):
            expected = 100 * g[f"multi_{name}_R{k}"].item()
            assert found[f"{name} R@{k}"] == pytest.approx(expected)
    own = [scores[i, owner == i].numpy().std() for i in range(12)]
    assert found["spread"] == pytest.approx(100 * np.mean(own))


# -------------------------------------------------------------------------------------- tokenizer


def decode(tokenizer, ids):
    """Return the text of ids, with a space at the end of each word."""
    names = {i: name for name, i in tokenizer.ids.items()}
    names.update({tokenizer.start: llip.START, tokenizer.start + 1: llip.END})
    values = {character: b for b, character in llip.CHARACTERS.items()}
    text = "".join(names[i] for i in ids).replace("</w>", " ")
    raw = [bytes([values[c]]) if c in values else c.encode() for c in text]
    return b"".join(raw).decode(errors="replace")


def test_tokenizer_is_the_reference_tokenizer():
    g = golden("tokenizer")
    assert llip.BYTES == g["byte_order"].tolist()
    assert [ord(llip.CHARACTERS[b]) for b in range(256)] == g["byte_chars"].tolist()
    merges = llip.read_merges(str(GOLDEN / "bpe_tiny.txt.gz"))
    tokenizer = llip.Tokenizer(merges, 77)
    assert tokenizer.start + 2 == g["tiny_vocab_size"] and len(merges) == 55
    for i, text in enumerate(g["strings"].tolist()):
        assert llip.clean(text) == g["cleaned"][i]
        assert "\x1f".join(llip.PIECES.findall(llip.clean(text))) == g["pieces"][i]
        ids = tokenizer.encode(text)
        assert ids == g["tiny_ids"][i, : g["tiny_len"][i]].tolist()
        assert decode(tokenizer, ids) == g["tiny_decoded"][i]


VOCABULARY = Path(os.environ.get("DATA", "data")).absolute() / "bpe_simple_vocab_16e6.txt.gz"


@pytest.mark.skipif(not VOCABULARY.is_file(), reason="needs OpenAI's vocabulary file in $DATA")
def test_tokenizer_with_the_real_vocabulary():
    g = golden("tokenizer")
    for context in (77, 16):
        tokenizer = llip.Tokenizer(llip.read_merges(str(VOCABULARY)), context)
        np.testing.assert_array_equal(tokenizer(g["strings"].tolist()), g[f"ids_{context}"])


def test_captions_are_cut_and_padded():
    tokenizer = llip.Tokenizer(llip.read_merges(str(GOLDEN / "bpe_tiny.txt.gz")), 6)
    caption = "the cat on the mat in the hat"
    rows = tokenizer(["", caption]).tolist()
    assert rows == [[567, 568, 0, 0, 0, 0], [567, *tokenizer.encode(caption)[:4], 568]]
    plain = llip.Tokenizer([], 9)
    assert decode(plain, plain.encode("Ab  é")) == "ab é "


def test_learned_merges_are_a_vocabulary(tmp_path):
    captions = ["low lower lowest", "new newer newest", "wide wider widest"] * 5
    merges = llip.learn_merges(captions, 20)
    assert merges == llip.learn_merges(captions[::-1], 20)
    lines = ["#version: own", *merges]
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    ours = llip.Tokenizer(merges, 9)
    read = llip.Tokenizer(llip.read_merges(str(tmp_path / "v.txt.gz")), 9)
    assert torch.equal(ours(captions), read(captions)) and ours.start == 512 + len(merges)
    assert len(ours.encode("lowest newer")) < len("lowestnewer")


# ------------------------------------------------------------------------------------------- data


def test_transforms_are_the_reference_transforms():
    """Training crops are compared off the border, where ours mix in what lies beyond the crop."""
    g = golden("transforms")
    size = int(g["image_size"])
    images = [g[f"im{i}"] for i in range(4)]
    split = llip.unlabelled(images, range(4), [["x"]] * 4, "val")
    train = replace(split, centred=False)
    for i, image in enumerate(images):
        _, pixels, _ = common.centre_crops(split, size, [i])
        expected = 255 * (tensor(g[f"val{i}"]) * llip.STD + llip.MEAN)
        assert (pixels[0] - expected).abs().max() <= 1.5
        random = torch.Generator().manual_seed(3 + i)
        box = common.random_crop(image.shape[1], image.shape[0], (0.9, 1.0), random)
        assert list(box) == g[f"train_box_{i}"].tolist()
        [pixels] = train.read(i, lambda *_, box=box: [box], [size], Image.BICUBIC)
        difference = (pixels.int() - torch.from_numpy(g[f"train_uint8_{i}"]).int()).abs()
        assert difference[:, 3:-3, 3:-3].max() <= 1
    for name, (w, h), seed in (("rrc", images[0].shape[1::-1], 3), ("rrc40x36", (40, 36), 53)):
        random = torch.Generator().manual_seed(seed)
        draws = [common.random_crop(w, h, (0.9, 1.0), random) for _ in range(16)]
        np.testing.assert_array_equal(draws, g[f"{name}_first16"])


def picture(i):
    """Return the bytes of a random image."""
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 255, (36, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def write_shard(path, members):
    """Write a tar shard of [(name, bytes), ...]."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_shards(folder, count=3, each=21):
    for shard in range(count):
        members = []
        for i in range(each):
            key = f"{shard}{i:05d}"
            members += [(f"{key}.jpg", picture(1000 * shard + i)), (f"{key}.json", b"{}")]
            members += [(f"._{key}.jpg", b"macOS"), (f"{key}.txt", f"{i} of {shard}".encode())]
        write_shard(folder / f"{shard:05d}.tar", members)
    return folder


def open_pairs(part="train", **fields):
    return llip.open_pairs(Config(**fields), part, common.World())


def test_shards_train_and_evaluate(tmp_path):
    """The number of loading processes changes nothing."""
    data = make_shards(tmp_path / "s")
    split = open_pairs(data=str(data))
    assert len(split) == 63 and split.captions[43] == ["1 of 2"]
    assert split.images[43].read() == picture(2001)
    flags = [SCRIPT.small.replace("none", "retrieval,features"), f"--data {data}"]
    here(SCRIPT, *flags, f"--val-data {data} --steps 3 --out one")
    here(SCRIPT, *flags, "--steps 3 --workers 2 --out two")
    assert_same("one", "two")
    found = log_rows("one")[-1]["eval"]
    assert {"trained", "mean token", "random"} == found.keys() and "t2i R@5" in found["trained"]
    assert np.load("one/features.npz")["features"].shape == (63, 16)
    assert Image.open("one/picture.png").size == (400, 200)


def test_bad_shards_are_named_and_limited(tmp_path, capsys):
    """Unusual names, a missing caption, an image that is none, a cut and a compressed shard."""
    data = make_shards(tmp_path / "s", count=1, each=110)
    write_shard(data / "1.tar", [("a.jpg", b"text"), ("a.txt", b"no image")])
    here(SCRIPT, SCRIPT.small, f"--data {data} --steps 8 --out one")
    assert "1.tar, byte 512" in capsys.readouterr().out
    write_shard(data / "2.tar", [("b.input.jpg", picture(2)), ("b.outputs.txt", b"x")])
    write_shard(data / "3.tar", [("c.jpg", picture(2))])
    here(SCRIPT, SCRIPT.small, f"--data {data} --steps 8", code=2)
    printed = capsys.readouterr()
    assert "expected b.jpg and b.txt, found b['.input.jpg', '.outputs.txt']" in printed.out
    assert "3.tar: expected c.jpg and c.txt" in printed.out and "more than 1 %" in printed.err
    whole = (data / "00000.tar").read_bytes()
    write_shard(tmp_path / "cut" / "0.tar", [])
    (tmp_path / "cut" / "0.tar").write_bytes(whole[: len(whole) // 2 + 300])
    assert len(open_pairs(data=str(tmp_path / "cut"))) > 40
    assert "cut/0.tar: expected" in capsys.readouterr().out
    (tmp_path / "z.tar.gz").write_bytes(gzip.compress(whole))
    assert "compressed" in refused(capsys, SCRIPT, f"--data {tmp_path / 'z.tar.gz'}")


def test_captions_files(tmp_path, monkeypatch):
    """Every layout gives the same images with the same captions, in the same order."""
    expected = {"a.jpg": ['one, "two"', "three\nlines\x85here"], "b.jpg": ["four"]}
    pairs = [(name, text) for name, texts in expected.items() for text in texts]
    for name in (*expected, "c.jpg"):
        (tmp_path / name).write_bytes(picture(1))
    coco = {"images": [{"id": name, "file_name": name} for name in expected]}
    coco["annotations"] = [{"image_id": name, "caption": text} for name, text in pairs]
    (tmp_path / "captions_train.json").write_text(json.dumps(coco))
    karpathy = []
    for name, texts in {**expected, "c.jpg": ["five"]}.items():
        part = {"a.jpg": "train", "b.jpg": "restval", "c.jpg": "test"}[name]
        sentences = [{"raw": text} for text in texts]
        karpathy.append({"filename": name, "split": part, "sentences": sentences})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": karpathy}))
    for name, delimiter, encoding in (("x.csv", ",", "utf-8-sig"), ("y.tsv", "\t", "utf-8")):
        with open(tmp_path / name, "w", newline="", encoding=encoding) as file:
            rows = csv.writer(file, delimiter=delimiter)
            rows.writerows([("n", "caption", "file"), *((1, text, name) for name, text in pairs)])
    monkeypatch.chdir(tmp_path)
    for data in ("captions_train.json", "dataset.json", "x.csv", "y.tsv"):
        split = open_pairs(data=data, columns="file,caption", images=".")
        assert split.names == list(expected) and split.captions == list(expected.values()), data
    val = open_pairs("val", data="dataset.json")
    assert val.names == ["c.jpg"] and val.captions == [["five"]]
    assert open_pairs("val", data="x.csv") is None
    coco["images"].append({"id": "v", "file_name": "c.jpg"})
    coco["annotations"] = [{"image_id": "v", "caption": "six"}]
    (tmp_path / "captions_val.json").write_text(json.dumps(coco))
    assert open_pairs("val", data="captions_train.json").captions == [["six"]]
    here(SCRIPT, SCRIPT.small.replace("none", "retrieval"), "--data dataset.json --steps 1")


def test_captions_files_that_are_none(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "lost.csv").write_text("filepath,title\n1.jpg,a dog\n")
    (tmp_path / "other.csv").write_text("file_name,text\n1.jpg,a dog\n")
    words = {
        "list.json": "no captions file",
        "lost.csv": "--images",
        "other.csv": "KeyError('filepath')",
    }
    for name, expected in words.items():
        assert expected in refused(capsys, SCRIPT, f"--data {tmp_path / name}")
    photographs(tmp_path / "flat", splits=(".",), classes=(".",))
    assert "train/CLASS" in refused(capsys, SCRIPT, f"--data {tmp_path / 'flat'}")
    assert not Path("runs").exists()


def test_classes_have_prompts_and_names(tmp_path):
    """Prompts have the published numbers; names and synonyms can be given."""
    assert len(set(llip.CIFAR10_PROMPTS)) == 18 and len(set(llip.IMAGENET_PROMPTS)) == 80
    assert "a photo of a hard to see {}." in llip.IMAGENET_PROMPTS
    data = photographs(tmp_path / "imagenet", classes=("n01", "great_shark"))
    (data / "train" / ".ipynb_checkpoints").mkdir()
    assert open_pairs(data=str(data)).captions[0][11] == "a photo of the great shark."
    (tmp_path / "names.json").write_text(json.dumps(["cat", ["dog", "puppy"]]))
    split = open_pairs("val", data=str(data), class_names=str(tmp_path / "names.json"))
    assert split.classes == ["great_shark", "n01"] and split.centred
    assert "art of the puppy." in split.captions[-1] and len(split.captions[-1]) == 160


# ---------------------------------------------------------------------------------------- weights


def test_released_weights_in_features_out(tmp_path, capsys):
    """A released layout through --init: features, zero-shot, another resolution, fine-tuning."""
    tiny_flags = "--heads 4 --text-heads 2 --mix-heads 4 --tau 5"
    path = GOLDEN / "llip_tiny.pt"
    assert "--heads" in refused(capsys, SCRIPT, f"--init {path} --no-train")
    assert "--vocabulary" in refused(capsys, SCRIPT, f"--init {path} --no-train {tiny_flags}")
    vocabulary = f"--vocabulary {GOLDEN / 'bpe_tiny.txt.gz'}"
    printed = refused(capsys, SCRIPT, f"--init {path} --no-train {tiny_flags} {vocabulary}")
    assert "token_embedding" in printed
    state = torch.load(path, weights_only=True)["state_dict"]
    table = next(k for k in state if k.endswith("token_embedding.weight"))
    state[table] = torch.randn(516, 12)
    torch.save({"epoch": 3, "state_dict": state}, "released.pt")
    Path("v.txt.gz").write_bytes(gzip.compress(b"#version\na b\nt h"))
    data = photographs(tmp_path / "photos", count=6, size=(24, 24))
    flags = f"--init released.pt {tiny_flags} --vocabulary v.txt.gz --device cpu --data {data}"
    flags += " --precision fp32 --workers 0"
    here(SCRIPT, flags, "--no-train --eval features,zeroshot --out one")
    found = np.load("one/features.npz")
    model, _ = load("released.pt", **FLAGS["llip_tiny"])
    pixels = np.stack([np.asarray(Image.open(data / p)) for p in found["paths"]])
    images = common.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.no_grad():
        values = model.image(llip.clip_range(images))[:, 1].mean(2).flatten(1)
        expected = F.normalize(values @ model.out_proj, dim=1)
    np.testing.assert_allclose(found["features"], expected, atol=1e-5)
    assert "top1" in log_rows("one")[-1]["eval"]["trained"]
    here(SCRIPT, flags, "--no-train --eval features --image-size 48 --out large")
    large, _ = load("released.pt", **FLAGS["llip_tiny"], image_size=48)
    assert len(large.visual.positional_embedding) == 5 + 36
    here(SCRIPT, flags, "--steps 2 --batch 4 --lr 0 --eval none --out tuned --no-compile")
    out_proj = next(state[k] for k in state if k.endswith("pred.out_proj"))
    close(weights("tuned")[1]["model.out_proj"], out_proj)


def test_presets_are_the_papers():
    """Widths, heads and mixture tokens of the models; the published parameters of the towers."""
    tokens = {"vit_b32": 64, "vit_b16": 32, "vit_l14": 32, "vit_l14_k64": 64, "vit_h14": 64}
    for name in (*tokens, "vit_g14"):
        config = Config(**llip.PRESETS[name])
        with torch.device("meta"):
            model = llip.Llip(config, 49408)
        assert len(model.k_proj) == tokens.get(name, 64)
        assert config.heads == min(16, config.width // 64)
        assert llip.schedules(config, 1999, config.steps) == pytest.approx(config.lr)
    assert Config(**llip.PRESETS["vit_l14"]).context == 64


def test_recomputed_activations_give_the_same_gradients():
    model, config = tiny()
    g = golden("llip_forward")
    images, tokens = tensor(g["images"]), torch.from_numpy(g["tokens"])[:4]
    found = []
    for again in (False, True):
        model.visual.transformer.recompute = model.transformer.recompute = again
        loss = loss_of(model, images, tokens)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# --------------------------------------------------------------------------------------- learning


def test_toy_world_says_what_is_there():
    """A place names the colour that is found in this quarter."""
    split, facts = llip.toy_world("val")
    colours = np.array([llip.ImageColor.getrgb(c) for c in llip.COLOURS]) / 255
    right = []
    for image, scene in zip(split.images[:100], facts, strict=False):
        assert scene["count"] == [f"{len(scene['object'])} shapes"]
        for fact in scene["place"]:
            place = next(p for p in llip.PLACES if fact.startswith(p))
            row, column = divmod(llip.PLACES.index(place), 2)
            quarter = image[16 * row :, 16 * column :][:16, :16].reshape(-1, 3) / 255.0
            bright = quarter.max(1)
            quarter = quarter[bright > bright.min() + 0.2] - quarter.min(0)
            nearest = abs(quarter.mean(0) / quarter.mean(0).max() - colours / colours.max())
            words = fact.removeprefix(place).split()
            right.append(llip.COLOURS[nearest.sum(1).argmin()] == words[0])
    assert np.mean(right) > 0.9
    assert len(set(split.captions[0])) == len(split.captions[0]) >= 2


def test_overfits_a_few_pairs():
    """32 pairs are told apart after a few hundred steps: loss near 0, retrieval perfect."""
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2, "text_width": 32, "context": 6}
    config = Config(batch=32, **sizes)
    model = llip.build(config, 40)
    images, tokens = torch.randn(32, 3, 32, 32), torch.randint(1, 38, (32, 6))
    tokens[:, 5] = 39
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = loss_of(model, images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        shown = (images - llip.SHIFT) / llip.SCALE
        scores = llip.score(model, model.text(tokens), shown)
    found = llip.retrieval(scores, torch.eye(32, dtype=torch.bool))
    assert loss < 1 and found["i2t R@1"] == found["t2i R@1"] == 100


def test_llip_learns():
    """On the toy scenes: captions are found again, and by their own mix of tokens."""
    rows = learn(SCRIPT, "--preset toy --steps 250 --batch 64 --mixture-tokens 4 --eval retrieval")
    results = {column: found["i2t R@10"] for column, found in rows[-1]["eval"].items()}
    assert results["trained"] > max(5, 2 * results["mean token"]), results
    assert results["random"] < 4, results
