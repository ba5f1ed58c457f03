"""NEFTune's noise: x' = x + U(-1, 1) · α/√(L·d) on the token embeddings, during training only.

Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning",
arXiv 2310.05914, Algorithm 1. Footnote 1 there makes L **each sequence's own** number of
tokens; libraries use the padded or packed width of the batch instead, which weakens the
noise of short sequences. The paper's rule is the default here, theirs can be imitated.

The noise is a pure function ε = f(seed, rank, step, i, k, t, j): i numbers the look-ups of a
forward (0 for nearly every model), k the sequence within the optimiser step, t the token among
the real tokens of its sequence, j the embedding dimension. Padding, padding side, padding-free
rows and micro-batch splits therefore change nothing, a resumed run draws what an uninterrupted
one draws, and torch's global random state is never touched, so that runs with and without noise
share data order and dropout.

Which tokens are real and where a sequence begins is read from what the model is given:
`attention_mask` of (batch, tokens), whose values may also number documents; else
`cu_seq_lens_q`, `seq_idx` or `position_ids` that restart (of several coordinates as well).
Without such a mask these are padding: what `cu_seq_lens_q` leaves over; `seq_idx` < 0; a document
of nothing but `pad_token_id` without a label; the unlabelled run of `pad_token_id` at a
document's end (where it is the eos token too, all but its first). Other layouts are refused.

This file needs only torch and transformers and can be copied out.
"""

import contextlib
import inspect
import math
import numbers
import sys
import warnings
import weakref

import torch
from transformers import TrainerCallback

try:
    from transformers import masking_utils
except ImportError:  # transformers before 4.53
    masking_utils = None

DISTRIBUTIONS = ("uniform", "gaussian", "rademacher")
LENGTHS = ("sequence", "padded", "packed")
WHERE = ("all", "text", "prompt", "response")
_CU = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens", "cu_seqlens")
_LAYOUT = ("attention_mask", "position_ids", "seq_idx", "past_key_values", "cache", "use_cache")
_DECODER = ("decoder_attention_mask", "decoder_position_ids")
_CONTEXT = (*_CU, *_LAYOUT, *_DECODER, "labels", "input_ids", "inputs_embeds", "token_type_ids")
_SPECIAL, _MEDIA = ("pad", "eos", "bos", "decoder_start"), ("image", "video", "audio")
_RATIO_BINS = 1000  # effective α is reported to 0.1 % of α from a histogram of bounded size
_CHUNK = {"cpu": 2**16}  # embedding cells hashed at a time: what a CPU's cache holds,
_CHUNK_ELSEWHERE = 2**22  # or about 150 MB of scratch on an accelerator, whatever the batch


# ------------------------------------------------------------------- scale and random numbers


def noise_scale(lengths, hidden_size, noise_alpha):
    """Bound of the uniform noise, α/√(L·d), one per sequence (paper, Algorithm 1).

    lengths: (sequences,) number of real tokens L of each, tensor or list. Returns float32
    of the same shape; the noise's variance is bound²/3, its expected squared norm over the
    sequence α²/3 whatever L and d are. Raises ValueError for lengths or sizes below 1.
    """
    _check_alpha(noise_alpha)
    lengths = torch.as_tensor(lengths)
    if not hidden_size >= 1 or not (lengths >= 1).all():
        raise ValueError("noise_scale: lengths and hidden_size must be at least 1")
    return _scale(lengths, hidden_size, noise_alpha)


def _scale(lengths, hidden_size, noise_alpha):
    # In float32 and as two roots: L·d = 131072·8192 would overflow float16 and int32.
    return noise_alpha / (lengths.float().sqrt() * math.sqrt(hidden_size))


def _check_alpha(noise_alpha):
    if isinstance(noise_alpha, bool) or not isinstance(noise_alpha, numbers.Real):
        raise TypeError(f"noise_alpha must be a number >= 0, not {noise_alpha!r}")
    if not math.isfinite(noise_alpha) or noise_alpha < 0:
        raise ValueError(f"noise_alpha must be finite and >= 0, not {noise_alpha!r}")


def _check_integer(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {value!r}")


def _check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def _signed(value):
    """The low 64 bits of a Python int as the signed number that an int64 tensor holds."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


# SplitMix64 (Steele, Lea & Flood, OOPSLA 2014): a Weyl sequence through a bijective finaliser.
# Integer arithmetic that wraps is exact on every device, so the noise is the same on all.
_WEYL = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(z):
    """SplitMix64's finaliser on a fresh int64 tensor, in place. Masks make shifts logical."""
    z ^= (z >> 30) & (2**34 - 1)
    z *= _MIX_1
    z ^= (z >> 27) & (2**37 - 1)
    z *= _MIX_2
    z ^= (z >> 31) & (2**33 - 1)
    return z


def _step_key(seed, rank, step, look_up=0):
    key = torch.zeros(1, dtype=torch.int64, device="cpu")
    for word in (seed, rank, step, *([look_up] if look_up else [])):
        key = _mix((key + _signed(word)) * _WEYL + _WEYL)
    return key.item()  # from the CPU: no device is waited for


def _token_keys(step_key, sequence, token):
    """One 64-bit key per token from k and t, both int64 of shape (tokens,)."""
    return _mix(_mix((sequence + 1) * _WEYL + step_key) + token * _WEYL)


def _unit_noise(keys, hidden_size, distribution):
    """(tokens, hidden_size) float32 with mean 0 and variance 1/3, a function of the keys."""
    j = torch.arange(1, hidden_size + 1, device=keys.device) * _WEYL
    bits = _mix(keys[:, None] + j)
    if distribution == "uniform":  # 24 bits, the half step makes the grid symmetric about 0
        return (bits >> 40).float().add_(0.5).mul_(2.0**-23)
    if distribution == "rademacher":
        return (bits >> 63).float().mul_(2).add_(1).mul_(1 / math.sqrt(3))
    # Gaussian by its quantile function; float64 so that devices agree after rounding.
    half = (bits >> 11).double().add_(0.5).mul_(2.0**-52)
    return torch.erfinv(half).mul_(math.sqrt(2 / 3)).float()


# ---------------------------------------------------------------- which token is which


def _layout(ids, context, pad=None, pad_is_end=False, masked_out=None):
    """Find real tokens, sequences and positions of a (batch, width) grid of token ids.

    context: what the model was given, see `_CONTEXT`; pad: id of padding if known; pad_is_end:
    it ends or begins sequences as well; masked_out: more cells to leave out, flat, bool.
    Returns flat tensors of batch·width cells: real (bool), k (sequence number, empty ones
    not counted), t (position among the real tokens), length (L of the token's sequence) and
    first (bool, true at each sequence's first token), and three counts: padding without a mask,
    documents inside a row, and sequences that begin in their middle. What the cells hold is
    decided on the device, sizes depend on batch·width alone, so nothing waits for the device.
    """
    (batch, width), device = ids.shape, ids.device
    cells = batch * width
    cell = torch.arange(cells, device=device)
    column = cell % max(width, 1)
    mask, positions, seq_idx = (context.get(n) for n in _LAYOUT[:3])
    cu = next((context[n] for n in _CU if n in context), None)
    labels = context.get("labels")
    if labels is not None:
        labels = labels.to(device).reshape(-1) if labels.shape == ids.shape else None

    def zeros():  # one number a sequence, and a last one that is a dump
        return torch.zeros(cells + 1, dtype=torch.int64, device=device)

    real = torch.ones(cells, dtype=torch.bool, device=device)
    before, segments, is_2d = 0, [], False
    if mask is not None:
        _check_mask(mask, ids.shape, context)
        is_2d = isinstance(mask, torch.Tensor) and mask.dim() == 2
        masks = mask.values() if isinstance(mask, dict) else [mask]
        grids = [m for m in masks if isinstance(m, torch.Tensor) and m.dim() == 4]
    if is_2d:
        before = mask.size(1) - width  # a mask wider than the ids covers a prefix first
        documents = mask[:, before:].to(device).expand(batch, width).reshape(-1)
        real = documents > 0
        segments += [] if documents.is_floating_point() else [documents]
    elif mask is not None and grids:
        real = _attends_itself(grids[0]).to(device).expand(batch, width).reshape(-1)
    elif context.get("decoder") and labels is not None:  # padding comes after the last label
        rest = (labels != -100).view(batch, width).flip(1).cumsum(1).flip(1)
        real = rest.reshape(-1) > 0
    if masked_out is not None:
        real = real & ~masked_out
    pieces = torch.zeros((), dtype=torch.int64, device=device)
    if cu is not None:
        if batch > 1 and is_2d:
            raise ValueError("cu_seq_lens_q with an attention_mask needs a batch of one row")
        cu = cu.to(device).long().flatten()
        # Sequence number by cell, so that an edge on a padding cell counts as well.
        segments.append(zeros().index_fill_(0, cu.clamp(0, cells), 1)[:-1].cumsum(0))
        real = real & (cell < cu.max())
        pieces = pieces + (cu.max() > cells)
    if seq_idx is not None:
        segments.append(seq_idx.to(device).expand(batch, width).reshape(-1))
        real = real & (segments[-1] >= 0)
    coordinates = None if positions is None else _coordinates(positions, ids.shape).to(device)
    by_position = coordinates is not None and cu is None and seq_idx is None

    def begins(real):
        count = real.cumsum(0)  # 1-based among all real tokens
        # The cell of the real token before this one, -1 if there is none.
        at = torch.full((cells + 2,), -1, device=device)
        at.scatter_(0, torch.where(real, count, cells + 1), cell)
        previous = at[(count - 1).clamp(min=0)]
        row_begins = (previous < 0) | (previous // max(width, 1) != cell // max(width, 1))
        first = row_begins
        for segment in segments:
            first = first | (segment[previous] != segment)
        if by_position and len(coordinates) > 1:  # text and images: only a beginning is all 0
            first = first | (coordinates == 0).all(0)
        elif by_position:  # goes on by one, or by as many as masked cells lie between
            ahead = coordinates[0] - coordinates[0][previous]
            first = first | ((ahead != 1) & (ahead != cell - previous))
        first = first & real
        return count, previous, first, first.cumsum(0) - 1, first & ~row_begins

    count, previous, first, k, inner = begins(real)
    padding = torch.zeros((), dtype=torch.int64, device=device)
    if not is_2d and cells and (pad is not None or labels is not None):
        flat = ids.reshape(-1)
        alike = flat == (ids[:, -1:].expand(batch, width).reshape(-1) if pad is None else pad)
        unlabelled = alike if labels is None else alike & (labels == -100)
        content = (real & ~unlabelled).long()
        of = torch.where(real, k, cells)
        total, passed = zeros().scatter_add_(0, of, content)[of], content.cumsum(0)
        base = zeros().scatter_(0, torch.where(first, k, cells), passed - content)
        tail = real & unlabelled & (passed - base[of] == total)
        pads = tail & (total == 0)  # whole documents of it
        if pad is None:
            # A guess: only at the end of the row, and behind another one.
            rest = (~unlabelled).view(batch, width).flip(1).cumsum(1).flip(1).reshape(-1)
            pads &= (rest == 0) & (k != k[cell - column])
        elif labels is not None:
            pads |= tail & alike[previous] & ~first if pad_is_end else tail
        real = real & ~pads
        count, previous, first, k, inner = begins(real)
        if pad is not None:
            left = (alike & real).view(batch, width)
            if pad_is_end:  # one of them is an end, three in a row are padding
                left = left[:, 2:] & left[:, 1:-1] & left[:, :-2]
            padding = left.sum() + (0 if segments or coordinates is not None else pads.sum())
    if coordinates is not None and masked_out is None:
        begin = coordinates[0]  # some models count from 1, 2 or pad_token_id + 1
        odd = (begin > 2) & (begin != column + before) & (begin != (2 if pad is None else pad + 1))
        whole = (column == 0) | real.roll(1)  # no masked tokens before it
        pieces = pieces + (first & odd & whole).sum()
    start = zeros().scatter_(0, torch.where(first, k, cells), count)
    length = zeros().scatter_add_(0, torch.where(real, k, cells), real.long())
    k = k.clamp(min=0)
    counts = torch.stack([padding, inner.sum(), pieces])
    return real, k, count - start[k], length[k].clamp(min=1), first, counts


def _check_mask(mask, shape, context):
    """Refuse a mask that does not say which tokens are real, with what to pass instead."""
    batch, width = shape
    is_tensor = isinstance(mask, torch.Tensor)
    size = tuple(mask.shape) if is_tensor and len(mask) in (1, batch) else ()
    told = any(name in context for name in (*_CU, "seq_idx", "position_ids"))
    if len(size) == 2:
        known = size[1] == width or (size[1] > width and _past(context) is not None)
    elif len(size) == 4:
        known = told and size[2] == width <= size[3]
    else:
        known = told and (isinstance(mask, dict) or type(mask).__name__ == "BlockMask")
    if known:
        return
    what = f"shape {tuple(mask.shape)}" if is_tensor else f"type {type(mask).__name__}"
    raise ValueError(
        f"attention_mask has {what}, token ids {tuple(shape)}: the noise needs the (batch, tokens)"
        " mask of real tokens. If this mask says which token sees which, also pass position_ids"
        " that restart at each document"
    )


def _attends_itself(mask):
    """Cells that a 4-D mask lets attend to themselves: padding does not, in most of them."""
    itself = mask[:, 0].diagonal(mask.size(3) - mask.size(2), -2, -1)
    # Booleans, ones and zeros, or zeros and large negative numbers to be added: the largest.
    return itself if mask.dtype == torch.bool else itself == mask.amax()


def _coordinates(positions, shape):
    """position_ids of any leading shape as (coordinates, batch·width)."""
    batch, width = shape
    rows = positions.size(-2) if positions.dim() > 1 else 1
    if positions.size(-1) != width or rows not in (1, batch):
        raise ValueError(
            f"position_ids have shape {tuple(positions.shape)}, token ids {tuple(shape)}: pass"
            " (batch, tokens), or (coordinates, batch, tokens)"
        )
    grid = positions.reshape(-1, rows, width)
    if len(grid) == 4:
        grid = grid[:1]  # Qwen-VL's: the text's positions before the three coordinates
    return grid.expand(-1, batch, width).reshape(len(grid), -1)


# --------------------------------------------------------------------------------- hooks


_WHY = {"reason": "NEFTune's noise is not for compiled graphs: use fullgraph=False"}
if "reason" not in inspect.signature(torch.compiler.disable).parameters:
    _WHY = {}  # before torch 2.7


class _Hook:
    """One hook of `noise`, kept out of compiled graphs; in a deep copy or pickle, a no-op."""

    def __init__(self, noise=None, method=None):
        self.noise = noise
        self.run = noise and torch.compiler.disable(getattr(noise, method), **_WHY)

    def __call__(self, *args):
        return None if self.run is None else self.run(*args)

    def __reduce__(self):
        return _Hook, ()


class EmbeddingNoise:
    """The noise of one model: attach, train, remove, report. See `noisy_embeddings`.

    noise_alpha: α >= 0. distribution: uniform (paper), gaussian or rademacher, all with the
    uniform's variance. length: whose token count L is: "sequence" (paper), "padded" (the
    batch's width, as transformers does; in a padding-free row the longest sequence) or
    "packed" (all real tokens of the row). where: all (paper); text: placeholders of images,
    videos and sound neither noised nor counted; prompt or response tokens, by labels == -100 (a
    sequence's first token, which nothing predicts, is prompt). seed, rank: key of the random
    numbers; rank None is the data-parallel rank, the same for all ranks of a tensor-parallel
    group. sides: 2 where a batch holds the chosen rows of preference pairs and then the rejected
    ones: both rows of a pair draw the same numbers. generator: only with length="padded": draw
    as transformers' hook does, padding included.
    """

    def __init__(
        self,
        noise_alpha=5.0,
        *,
        distribution="uniform",
        length="sequence",
        where="all",
        seed=0,
        rank=None,
        sides=1,
        generator=None,
    ):
        _check_alpha(noise_alpha)
        _check_choice("distribution", distribution, DISTRIBUTIONS)
        _check_choice("length", length, LENGTHS)
        _check_choice("where", where, WHERE)
        _check_integer("seed", seed)
        if rank is not None:
            _check_integer("rank", rank)
        _check_integer("sides", sides)
        if sides < 1:
            raise ValueError(f"sides must be >= 1, not {sides!r}")
        if generator is not None and (length, distribution, where) != ("padded", "uniform", "all"):
            raise ValueError(
                "generator= imitates transformers' hook and needs length='padded',"
                " distribution='uniform', where='all'"
            )
        self.noise_alpha, self.distribution = float(noise_alpha), distribution
        self.length, self.where, self.seed, self.generator = length, where, int(seed), generator
        self.rank, self._given_rank, self.sides = rank, rank, int(sides)
        self._trainer = self._decoder = self._config = self._whole_config = None
        self._handles, self._frames, self._embeddings = [], [], []
        self._labels, self._step, self._step_is_set, self._sequences = None, 0, False, {}
        self._calls, self._calls_in_forward, self._hidden, self._sums = 0, 0, None, None
        self._counts, self._leak, self._said = None, None, set()

    # -- life ---------------------------------------------------------------------------

    @property
    def attached(self):
        return bool(self._embeddings)

    def attach(self, model):
        """Put the noise on `model.get_input_embeddings()`; returns self.

        Raises RuntimeError when noise is there already, ours or another, and where the ranks of
        a sequence- or context-parallel group each hold a piece of every sequence.
        """
        model = _unwrapped(model)
        embedding = model.get_input_embeddings()
        for hook in list(embedding._forward_hooks.values()):
            other = isinstance(hook, _Hook) and hook.noise
            if other and not other._training_goes_on():
                other.remove()  # left behind by a train() that raised
            elif other:
                raise RuntimeError("embedding noise is attached already: remove() it first")
        if self.attached:
            raise RuntimeError("embedding noise is attached already: remove() it first")
        _refuse_second_noise(embedding)
        config = getattr(model, "config", None)
        self._whole_config = config
        try:
            self._config = config.get_text_config(decoder=True)
        except (AttributeError, ValueError):  # no such config, or several in one
            self._config = config
        embeddings = [embedding]
        if getattr(config, "is_encoder_decoder", False):
            if self.where in ("prompt", "response"):
                raise ValueError(f"where='{self.where}' is for decoder-only models")
            self._decoder = getattr(model, "get_decoder", lambda: None)()
            if self._decoder is None:
                raise ValueError(
                    f"{type(model).__name__} has an encoder and no get_decoder(), so that the"
                    " tokens of the two cannot be told apart"
                )
            embeddings = _token_embeddings(model, embedding)
        known = dict(model.named_modules(remove_duplicate=False))
        names = [name for name, module in known.items() if any(module is e for e in embeddings)]
        if not names:
            raise ValueError("get_input_embeddings() returned a module outside the model")
        self.rank = _data_rank(model) if self._given_rank is None else self._given_rank
        paths = [name.split(".")[:i] for name in names for i in range(name.count(".") + 1)]
        around = {id(known[".".join(path)]): known[".".join(path)] for path in paths}
        for module in around.values():
            self._handles += [
                module.register_forward_pre_hook(_Hook(self, "_enter"), with_kwargs=True),
                module.register_forward_hook(_Hook(self, "_leave"), always_call=True),
            ]
        for module in embeddings:
            hook = _Hook(self, "_add_noise")
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        self._embeddings = embeddings
        _forget_compiled()
        return self

    def _training_goes_on(self):
        """False once the train() that attached this noise has ended, even by an exception."""
        if self._trainer is None:  # no callback's
            return True
        trainer = self._trainer()
        return trainer is not None and _trains(trainer) is not None

    def remove(self):
        """Take the noise off again; harmless when it is off."""
        for handle in self._handles:
            handle.remove()
        if self.attached:
            _forget_compiled()
        self._handles, self._frames, self._embeddings, self._decoder = [], [], [], None

    def set_step(self, step):
        """Say which optimiser step the following forwards belong to; sequence numbers restart."""
        _check_integer("step", step)
        if step < 0:
            raise ValueError(f"step must be >= 0, not {step!r}")
        self._step, self._step_is_set, self._sequences = int(step), True, {}

    def set_labels(self, labels):
        """Labels (batch, tokens) of the next forward, where that forward is not given them."""
        self._labels = None if labels is None else torch.as_tensor(labels)

    # -- the forward ----------------------------------------------------------------------

    def _enter(self, module, args, kwargs):
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel runs the model in threads, which would share one stream of"
                " noise: use one device (CUDA_VISIBLE_DEVICES) or torchrun"
            )
        if any(entered is module for entered, _ in self._frames):
            self._frames.clear()  # a KeyboardInterrupt cut the last forward without its exit hook
        if not self._frames:
            if not self._training_goes_on():
                return self.remove()
            self._calls_in_forward = 0
            if not self._step_is_set:
                self._sequences = {}
        if args:
            parameters = inspect.signature(module.forward).parameters.values()
            names = (p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {n: kwargs[n] for n in _CONTEXT if kwargs.get(n) is not None}
        self._frames.append((module, given))

    def _leave(self, module, args, output):
        given = {}
        while self._frames:
            inner, given = self._frames.pop()
            if inner is module:
                break
        if self._frames:
            return
        self._labels = None
        calls, self._calls_in_forward = self._calls_in_forward, 0
        if calls and not self._step_is_set:
            self._step += 1
        if calls or output is None or not self.attached:
            return
        if not (self._embeddings[0].training and torch.is_grad_enabled()):
            return
        if "inputs_embeds" not in given:
            raise RuntimeError(
                "this forward did not call the embedding that the noise is on, so none was added:"
                " attach after the last change of the model (resize_token_embeddings,"
                " get_peft_model)"
            )
        self._warn(
            "inputs_embeds",
            "inputs_embeds was given, so no embedding was looked up and no noise added: pass"
            " input_ids, or add the noise to inputs_embeds yourself, within ±noise_scale(...)",
        )

    def _context(self):
        """What the nearest enclosing modules were given about these ids and no others."""
        in_decoder = any(module is self._decoder for module, _ in self._frames)
        found, beyond = {"decoder": in_decoder}, False
        for module, given in reversed(self._frames):
            if in_decoder and beyond:  # there the plain names are the encoder's
                names = {"labels": "labels"} | {name: name[8:] for name in _DECODER}
                given = {names[n]: value for n, value in given.items() if n in names}
            elif self._decoder is not None and not in_decoder:
                given = {n: value for n, value in given.items() if n != "labels"}
            beyond = beyond or module is self._decoder
            found = {**given, **found}
        return found if self._labels is None else found | {"labels": self._labels}

    def _add_noise(self, module, args, kwargs, output):
        if not (module.training and torch.is_grad_enabled() and self.attached):
            return None
        _refuse_second_noise(module)
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "the embedding was called again during backward: checkpoint the decoder layers"
                " (model.gradient_checkpointing_enable(), activation_checkpointing_enable() from"
                " transformers 5.24 on), not the embedding, or noise would be drawn twice"
            )
        if not self._frames:
            raise RuntimeError(
                "the embedding was called outside the model's forward, so sequence lengths are"
                " unknown: call the model, or use torch.no_grad() to only look embeddings up"
            )
        ids = args[0] if args else kwargs.get("input")
        if output.dim() != 3 or ids.dim() != 2:
            return None  # a helper look-up of single ids, as some vision models do
        context = self._context()
        types = context.get("token_type_ids")
        if types is not None and types.data_ptr() == ids.data_ptr() and ids.numel():
            return None  # GPT-2 looks its token types up in the token embedding
        _refuse_pieces(self._frames[0][1], ids, output)
        look_up = self._calls_in_forward
        self._calls += 1
        self._calls_in_forward += 1
        if self.noise_alpha == 0 or not ids.numel():
            return None
        return output + self._draw(ids, output.detach(), context, look_up)

    def _draw(self, ids, clean, context, look_up):
        (batch, width), hidden, device = ids.shape, clean.size(-1), clean.device
        ids = ids.to(device)
        masked_out = self._placeholders(ids, context) if self.where == "text" else None
        pad, *ends = (getattr(self._config, f"{n}_token_id", None) for n in _SPECIAL)
        pad_is_end = any(pad in e if isinstance(e, list) else pad == e for e in ends)
        layout = _layout(ids, context, pad, pad_is_end, masked_out)
        real, k, t, own, first, counts = layout
        sequences, uneven = first.sum() // self.sides, first.sum() % self.sides
        counts = torch.cat([counts, uneven[None]])
        before = self._sequences.get(look_up, 0)
        k = (k % sequences.clamp(min=1) if self.sides > 1 else k) + before
        self._sequences[look_up] = before + sequences
        if self.length == "sequence":
            length = own
        elif self.length == "packed":
            length = real.view(batch, width).sum(1, keepdim=True).clamp(min=1)
            length = length.expand(batch, width).reshape(-1)
        else:
            length = torch.full_like(own, width)
            if batch == 1 and self.generator is None:  # several sequences: a padding-free row
                length = torch.where(first.sum() > 1, (own * real).max(), length)
        noised = real & self._chosen(ids.shape, context, first)
        bound = _scale(length, hidden, self.noise_alpha) * noised
        noise, flat = torch.empty_like(clean), clean.reshape(-1, hidden)
        if self.generator is not None:  # the bound rounded as there, so that bits agree
            edge = float(self.noise_alpha / torch.tensor(width * hidden, device="cpu").sqrt())
            noise.uniform_(-edge, edge, generator=self.generator)
        cells = noise.view(-1, hidden)
        keys = _token_keys(_step_key(self.seed, self.rank, self._step, look_up), k, t)
        added = looked_up = 0.0
        rows = max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // hidden)
        for i in range(0, len(cells), rows):
            some = slice(i, i + rows)
            if self.generator is None:
                part = _unit_noise(keys[some], hidden, self.distribution).mul_(bound[some, None])
                cells[some] = part
            else:
                part = cells[some].float() * noised[some, None]
            added = added + part.square_().sum()
            looked_up = looked_up + flat[some].float().square().sum(1).mul_(noised[some]).sum()
        ratio = (own / length).sqrt().clamp(max=1) * _RATIO_BINS
        seen = torch.zeros(_RATIO_BINS + 1, dtype=torch.float32, device=device)
        seen.scatter_add_(0, ratio.round().long(), first.float())
        expected = bound.square().sum() * hidden / 3
        sums = torch.cat([torch.stack([noised.sum(), added, expected, looked_up]), seen])
        sums = sums.to(torch.float32 if device.type == "mps" else torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts
        self._leak = self._leak or _leak(self._config, context)
        self._hidden = hidden
        if device.type == "cpu":
            self._look()  # nothing is waited for here
        return noise

    def _placeholders(self, ids, context):
        """Cells whose embedding is replaced by that of an image, a video or a sound, flat."""
        given = context.get("input_ids")  # some models put other ids in their place
        ids = given.to(ids.device) if given is not None and given.shape == ids.shape else ids
        names = (f"{kind}_token_{end}" for kind in _MEDIA for end in ("id", "index"))
        found = [i for n in names if isinstance(i := getattr(self._whole_config, n, None), int)]
        return sum((ids == i).reshape(-1) for i in found) > 0 if found else None

    def _look(self, ended=False):
        """Say what was counted on the device. It is waited for here, so this is done seldom."""
        if self._sums is None or self._sums.is_meta:
            return
        padding, inner, pieces, uneven = self._counts.tolist()
        if uneven:
            self._counts[3] = 0
            raise ValueError(f"sides={self.sides} needs that many sequences, or a multiple of it")
        if pieces:
            self._counts[2] = 0
            raise RuntimeError(
                "position_ids or cu_seq_lens_q say that sequences begin in their middle"
                f" ({pieces} here): each process or forward has a piece of them, so their lengths"
                " are unknown. Pass whole sequences, without context or sequence parallelism"
            )
        if padding:
            self._warn(
                "padding",
                f"{padding} tokens have the id of the padding ({self._config.pad_token_id}) and"
                " no attention_mask was given: pass it, or the model attends to padding",
            )
        if inner and self._leak:
            what = f"the noise takes each document by itself, the model does not: {self._leak}"
            self._warn("documents", what)
        if ended and self.noise_alpha > 0 and not self._sums[0]:
            self._warn(
                "nothing",
                f"no noise was added: of {self._calls} look-ups in training mode no token was real"
                f" (attention_mask) and to be noised (where='{self.where}')",
            )

    def _warn(self, what, text):
        """Warn once of a kind: the numbers in the text grow with every forward."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(text, stacklevel=2)

    def _chosen(self, shape, context, first):
        if self.where in ("all", "text"):
            return torch.ones_like(first)
        labels = context.get("labels")
        if labels is None:
            raise RuntimeError(
                f"where='{self.where}' needs labels: pass labels= to the forward or call"
                " set_labels(labels) before it"
            )
        if labels.shape != torch.Size(shape):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, token ids {tuple(shape)}")
        # A first token's label is never learned, and padding-free collators take it away.
        response = (labels != -100).flatten().to(first.device) & ~first
        return response if self.where == "response" else ~response

    def report(self):
        """What was really added, as plain numbers (this is where the device is waited for).

        calls, tokens (noised ones), noise_rms and expected_rms (per embedding cell),
        relative_rms (noise over the clean embedding of the same tokens) and the quantiles
        effective_alpha_p10/p50/p90 over sequences, effective α = bound·√(L_i·d). Warns of noise
        under 1 % or over 100 % of the embedding. Placeholders of images count unless where="text".
        """
        names = ("noise_rms", "expected_rms", "relative_rms")
        alphas = ("effective_alpha_p10", "effective_alpha_p50", "effective_alpha_p90")
        out = {"noise_alpha": self.noise_alpha, "calls": self._calls, "tokens": 0}
        if self._sums is None:
            return out | dict.fromkeys(names + alphas)
        self._look()
        tokens, noise, expected, clean, *seen = self._sums.tolist()
        cells = max(tokens * self._hidden, 1)
        out["tokens"] = int(tokens)
        out["noise_rms"] = math.sqrt(noise / cells)
        out["expected_rms"] = math.sqrt(expected / cells)
        out["relative_rms"] = relative = math.sqrt(noise / clean) if clean else None
        if relative is not None and tokens and not 0.01 <= relative <= 1:
            self._warn(
                "size",
                f"the noise has {relative:.2g} times the size of the embedding: "
                + ("too little to matter" if relative < 1 else "it hides the tokens")
                + "; suggest_noise_alpha(model, lengths) gives the α for a quarter",
            )
        seen = torch.tensor(seen, dtype=torch.float64, device="cpu").cumsum(0)
        for name, quantile in zip(alphas, (0.1, 0.5, 0.9), strict=True):
            position = int(torch.searchsorted(seen, quantile * float(seen[-1])))
            out[name] = self.noise_alpha * min(position, _RATIO_BINS) / _RATIO_BINS
        return out


def _unwrapped(model):
    """The model inside DistributedDataParallel and its like; ValueError without an embedding."""
    while not hasattr(model, "get_input_embeddings") and hasattr(model, "module"):
        model = model.module
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        embedding = None
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no input embedding module to add noise to")
    return model


def _token_embeddings(model, embedding):
    """The modules in which an encoder-decoder model looks up ids, whatever it says is its own."""
    parts = (getattr(model, get, lambda: None)() for get in ("get_encoder", "get_decoder"))
    own = (embedding, *(getattr(part, "embed_tokens", None) for part in parts))
    weights = [e.weight for e in own if hasattr(e, "weight")]
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    found = [m for m in modules if any(m.weight is weight for weight in weights)]
    inside = any(m is part for m in found for part in embedding.modules())
    return found if inside else [embedding, *found]


def _data_rank(model):
    """Number of this process among those that see other rows than it does.

    The ranks of a tensor-parallel (or pipeline) group hold the same tokens, and must draw the
    same noise. Their mesh is the model's, that of its sharded weights, or accelerate's.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    state = getattr(state, "_shared_state", {})
    meshes = [getattr(model, "_device_mesh", None)]
    meshes += [state.get("device_mesh"), state.get("ds_device_mesh")]
    meshes += [getattr(p, "device_mesh", None) for p in model.parameters()]
    rank, world = distributed.get_rank(), distributed.get_world_size()
    for mesh in (m for m in meshes if m is not None):
        default = "tp" if getattr(model, "_tp_size", None) else "dp"
        dims = list(zip(mesh.mesh_dim_names or [default] * mesh.ndim, mesh.shape, strict=True))
        pieces = [name for name, size in dims if name in ("cp", "sp") and size > 1]
        if pieces:
            raise RuntimeError(
                f"the mesh has the dimension {pieces[0]}: with context or sequence parallelism"
                " each process has a piece of every sequence, whose length is then unknown"
            )
        if not any(name in ("tp", "pp") and size > 1 for name, size in dims):
            continue
        ranks = mesh.mesh.flatten().tolist()
        copies, low = world // len(ranks), min(ranks)
        index = low // len(ranks) if max(ranks) - low < len(ranks) else low % copies
        for (name, size), at in zip(dims, mesh.get_coordinate(), strict=True):
            index = index if name in ("tp", "pp") else index * size + at
        return index
    return rank


def _past(given):
    """The cache of earlier tokens, which transformers 5.24 begins to call `cache`."""
    return given.get("past_key_values", given.get("cache"))


def _refuse_pieces(given, ids, output):
    """Refuse a look-up that holds only a piece of each sequence, or of each embedding."""
    past = _past(given)
    if hasattr(past, "get_seq_length"):
        cached = int(past.get_seq_length())
    else:
        cached = past[0][0].size(-2) if isinstance(past, (list, tuple)) and past else 0
    if cached:
        raise RuntimeError(
            f"the cache holds {cached} earlier tokens, so that this forward has only a piece of"
            " each sequence: pass whole sequences, without past_key_values"
        )
    if hasattr(output, "full_tensor") or output.shape[:2] != ids.shape:
        raise RuntimeError(
            f"the embedding gave {tuple(output.shape)} for token ids {tuple(ids.shape)} as a"
            f" {type(output).__name__}: its output is sharded (sequence parallelism), and the"
            " noise needs whole sequences. Let the embedding put out plain, replicated tensors"
        )


def _leak(config, context):
    """Why transformers' own attention mixes the documents of a row; None where it does not."""
    kind = getattr(config, "_attn_implementation", None) or ""
    own, mask = kind in ("eager", "sdpa", "flex_attention"), context.get("attention_mask")
    positions = "position_ids" in context
    if not own and "flash" not in kind:
        return None  # nobody knows
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and (own or not positions):
        return "it reads attention_mask as ones and zeros. Pass position_ids and no mask"
    if mask is not None:
        return None
    if not positions and (own or not any(name in context for name in _CU)):
        return f"{kind} attention needs position_ids that restart at each document"
    if own and not hasattr(masking_utils, "find_packed_sequence_indices"):
        return f"{kind} attention does not separate documents in this version of transformers"
    if own and context.get("use_cache", getattr(config, "use_cache", False)):
        return f"{kind} attention separates documents only with use_cache=False"
    return None


def _refuse_second_noise(embedding):
    """Another hook or a replaced forward; transformers' attribute without its hook is nothing."""
    hooks = embedding._forward_hooks.values()
    if any("neft" in getattr(h, "__name__", type(h).__name__).lower() for h in hooks):
        raise RuntimeError(
            "transformers' own NEFTune hook is on this model: unset neftune_noise_alpha and load"
            " the model anew, or the noise would be added twice"
        )
    forward = vars(embedding).get("forward")
    while forward is not None and getattr(forward, "__self__", None) is not embedding:
        library = getattr(getattr(forward, "func", forward), "__module__", None) or ""
        if library.split(".")[0] not in ("accelerate", "transformers", "torch", "peft"):
            which = getattr(forward, "__qualname__", forward)
            raise RuntimeError(
                f"the embedding's forward was replaced by {which}, which may add noise too and"
                " double it: take it off with `del model.get_input_embeddings().forward`"
            )
        forward = getattr(forward, "__wrapped__", None)


def _trains(trainer):
    """Whether a call of this Trainer's train() is under way in this thread; None: whose is."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "train":
            found = frame.f_locals.get("self")
            if found is trainer or (trainer is None and hasattr(found, "callback_handler")):
                return found
        frame = frame.f_back
    return None


def _forget_compiled():
    """Compiled code does not notice new hooks: drop it, so that the change takes effect."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


# ----------------------------------------------------------------------------- public faces


@contextlib.contextmanager
def noisy_embeddings(model, noise_alpha=5.0, **options):
    """Noise on the model's token embeddings inside the `with` block, and nowhere else.

        with noisy_embeddings(model, noise_alpha=5.0, seed=0) as noise:
            model(**batch).loss.backward()
        noise.report()

    Only forwards in training mode with gradients enabled are noised; each is one optimiser
    step unless `noise.set_step(n)` says otherwise. Options: see `EmbeddingNoise`. The noise
    is gone on every exit, KeyboardInterrupt included; a block without any noisy forward
    ends with a warning.
    """
    noise = EmbeddingNoise(noise_alpha, **options).attach(model)
    try:
        yield noise
        if noise._calls == 0:
            warnings.warn(
                "no noise was added: no forward ran in training mode with gradients", stacklevel=3
            )
        noise._look(ended=True)
    finally:
        noise.remove()


class NEFTuneCallback(TrainerCallback):
    """The noise as a callback of transformers' `Trainer` and of TRL's `SFTTrainer`.

    Same keywords as `noisy_embeddings`; seed None takes the trainer's. The step is the
    trainer's global step, so that a resumed run continues with the draws it would have had.
    `report()` and `remove()` are those of `EmbeddingNoise`. A callback is not told of an
    exception in train(): the noise acts only while that call runs, and is gone after it. Another
    train() begins with step 0 and draws the same noise again, unless it resumes.
    """

    def __init__(self, noise_alpha=5.0, *, seed=None, **options):
        self.options = {"noise_alpha": noise_alpha, "seed": seed, **options}  # as given
        self._arguments = {"noise_alpha": noise_alpha, **options}
        self._seed = seed
        self._calls_before, self._looked = 0, False
        self.noise = EmbeddingNoise(seed=0 if seed is None else seed, **self._arguments)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if getattr(args, "neftune_noise_alpha", None) is not None:
            raise RuntimeError(
                "unset neftune_noise_alpha and load the model anew, transformers' hook is on it:"
                " NEFTuneCallback adds the noise already"
            )
        self.noise.remove()
        seed = args.seed if self._seed is None else self._seed
        self.noise = EmbeddingNoise(seed=seed, **self._arguments)
        trainer = _trains(None)
        self.noise._trainer = None if trainer is None else weakref.ref(trainer)
        self.noise.attach(model)
        self._looked = False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.noise.attached:
            raise RuntimeError("the embedding noise was removed during training")
        self.noise.set_step(state.global_step)
        self._calls_before = self.noise._calls

    def on_step_end(self, args, state, control, **kwargs):
        if self.noise._calls == self._calls_before:
            raise RuntimeError(
                f"no noise was added in optimiser step {state.global_step}: the model was not"
                " called in training mode with input_ids"
            )
        if not self._looked:  # once, for it waits for the device
            self.noise._look()
            self._looked = True

    def on_train_end(self, args, state, control, **kwargs):
        self.noise._look(ended=True)
        self.noise.remove()

    def report(self):
        return self.noise.report()

    def remove(self):
        self.noise.remove()


def suggest_noise_alpha(model, lengths, share=0.25):
    """The α whose noise has `share` of the norm of a token's embedding, as a plain float.

    model: any Hugging Face causal LM; lengths: tokens of each training sequence, list or
    tensor; share: noise norm over embedding norm, > 0. The noise of one token has the norm
    α/√(3L) (root mean square, whatever d is), so α = share · mean row norm · √(3 · median L).
    A quarter is what the paper's α = 5 means on LLaMA-2-7B, whose rows have a norm of about
    1.1 (from its published standard deviation, not measured by us), at L ≈ 110. It is a
    starting point for a search, not a result. Rows are measured behind the embedding module,
    so that models which scale inside it (Gemma) are treated like the others.
    Raises ValueError for no lengths, lengths below 1, a mask in their place, a share that is not
    positive, and weights that are not here, not finite or zero.
    """
    lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.dim() > 1 or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be one number a sequence, not a mask or a batch of {lengths.shape}"
        )
    lengths = lengths.double().flatten()
    if len(lengths) == 0 or not (lengths >= 1).all():
        raise ValueError("lengths must hold at least one sequence, each of at least 1 token")
    if not (share > 0 and math.isfinite(share)):
        raise ValueError(f"share must be finite and > 0, not {share!r}")
    embedding = _unwrapped(model).get_input_embeddings()
    weight = embedding.weight
    if weight.is_meta or not weight.numel() or hasattr(weight, "full_tensor"):
        raise ValueError(
            "the embedding's weights must be here: they are on the meta device, or sharded (ZeRO,"
            " FSDP, tensor parallel). Ask before the model is sharded"
        )
    ids = torch.arange(getattr(embedding, "num_embeddings", len(weight)), device=weight.device)
    with torch.no_grad():
        norms = [embedding(part[None]).float().norm(dim=-1)[0] for part in ids.split(4096)]
    norm = float(torch.cat(norms).mean())
    if not 0 < norm < math.inf:
        raise ValueError(f"the embedding's rows must have a finite norm > 0, their mean is {norm}")
    return share * norm * math.sqrt(3 * float(lengths.quantile(0.5)))
