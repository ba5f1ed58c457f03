"""NEFTune's noise: x' = x + U(-1, 1) · α/√(L·d) on the token embeddings, during training only.

Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning",
arXiv 2310.05914, Algorithm 1. Footnote 1 there makes L **each sequence's own** number of
tokens; libraries use the padded or packed width of the batch instead, which weakens the
noise of short sequences. The paper's rule is the default here, theirs can be imitated.

The noise is a pure function ε = f(seed, rank, step, k, t, j): k numbers the sequence within
the optimiser step, t the token among the real tokens of its sequence, j the embedding
dimension. Padding, padding side, padding-free rows and micro-batch splits therefore change
nothing, a resumed run draws what an uninterrupted one draws, and torch's global random
state is never touched, so that runs with and without noise share data order and dropout.

This file needs only torch and transformers and can be copied out.
"""

import contextlib
import inspect
import math
import numbers
import warnings
import weakref

import torch
from transformers import TrainerCallback

DISTRIBUTIONS = ("uniform", "gaussian", "rademacher")
LENGTHS = ("sequence", "padded", "packed")
WHERE = ("all", "prompt", "response")
_CONTEXT = ("attention_mask", "position_ids", "cu_seq_lens_q", "labels", "inputs_embeds")
_ACTIVE = weakref.WeakKeyDictionary()  # embedding module -> the EmbeddingNoise attached to it
_RATIO_BINS = 1000  # effective α is reported to 0.1 % of α from a histogram of bounded size
_CHUNK = 2**22  # embedding cells hashed at a time: 32 MiB of int64 scratch, whatever the batch


# ------------------------------------------------------------------- scale and random numbers


def noise_scale(lengths, hidden_size, noise_alpha):
    """Bound of the uniform noise, α/√(L·d), one per sequence (paper, Algorithm 1).

    lengths: (sequences,) number of real tokens L of each, tensor or list. Returns float32
    of the same shape; the noise's variance is bound²/3, its expected squared norm over the
    sequence α²/3 whatever L and d are. Raises ValueError for lengths or sizes below 1.
    """
    _check_alpha(noise_alpha)
    lengths = torch.as_tensor(lengths)
    if hidden_size < 1 or (lengths < 1).any():
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


def _step_key(seed, rank, step):
    key = torch.zeros(1, dtype=torch.int64)
    for word in (seed, rank, step):
        key = _mix((key + _signed(word)) * _WEYL + _WEYL)
    return key.item()  # a CPU tensor: no device is waited for


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
        return torch.where(bits < 0, -1.0, 1.0).mul_(1 / math.sqrt(3))
    # Gaussian by its quantile function; float64 so that devices agree after rounding.
    half = (bits >> 11).double().add_(0.5).mul_(2.0**-52)
    return torch.erfinv(half).mul_(math.sqrt(2 / 3)).float()


# ---------------------------------------------------------------- which token is which


def _layout(shape, device, context):
    """Find real tokens, sequences and positions of a (batch, width) grid of token ids.

    Returns flat int64/bool tensors of batch·width cells: real, k (sequence number, empty
    ones not counted), t (position among real tokens), length (L of the token's sequence),
    first (true at each sequence's first token), and whether the row is padding-free.
    Sizes are bounded by the cell count, so nothing here waits for the device.
    """
    batch, width = shape
    cells = batch * width
    mask, positions, cu = (
        context.get(n) for n in ("attention_mask", "position_ids", "cu_seq_lens_q")
    )
    real = torch.ones(batch, width, dtype=torch.bool, device=device)
    if mask is not None:
        if mask.dim() != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: the noise needs the (batch, tokens)"
                " mask of real tokens, not an expanded one"
            )
        real = mask[:, -width:].to(device).bool().expand(batch, width)
    rows = torch.arange(cells, device=device).view(batch, width) // width
    count = real.flatten().cumsum(0)  # 1-based among all real tokens
    # The real token before this one: same row, and position one lower, means same sequence.
    order = torch.where(real.flatten(), count, cells + 1)
    previous = torch.full((cells + 2,), -1, device=device).scatter_(
        0, order, torch.arange(cells, device=device)
    )[(count - 1).clamp(min=0)]
    previous = torch.where(count > 1, previous, -1)
    first = (previous < 0) | (rows.flatten()[previous] != rows.flatten())
    if cu is not None and batch == 1:
        marks = torch.zeros(cells + 1, dtype=torch.bool, device=device)
        marks[cu.to(device).long()] = True
        first |= marks[:-1]
    elif positions is not None and positions.dim() == 2 and positions.size(-1) == width:
        flat = positions.to(device).expand(batch, width).flatten()
        first |= flat[previous] + 1 != flat
    first &= real.flatten()
    real = real.flatten()
    k = first.long().cumsum(0) - 1
    dump = cells  # scatter target of cells that do not count
    start = torch.zeros(cells + 1, dtype=torch.int64, device=device)
    start = start.scatter_(0, torch.where(first, k, dump), count)
    length = torch.zeros(cells + 1, dtype=torch.int64, device=device)
    length = length.scatter_add_(0, torch.where(real, k, dump), real.long())
    k = k.clamp(min=0)
    padding_free = batch == 1 and (cu is not None or (positions is not None and mask is None))
    return real, k, count - start[k], length[k].clamp(min=1), first, padding_free


# --------------------------------------------------------------------------------- hooks


class _Hook:
    """A hook that a deep copy or pickle of the model turns into a no-op."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return None if self.function is None else self.function(*args)

    def __reduce__(self):
        return _Hook, (None,)


class EmbeddingNoise:
    """The noise of one model: attach, train, remove, report. See `noisy_embeddings`.

    noise_alpha: α >= 0. distribution: uniform (paper), gaussian or rademacher, all with the
    uniform's variance. length: whose token count L is: "sequence" (paper), "padded" (the
    batch's width, as transformers does; in a padding-free row the longest sequence) or
    "packed" (all real tokens of the row). where: all (paper), prompt or response tokens, by
    labels == -100. seed, rank: key of the random numbers; rank None asks torch.distributed.
    generator: only with length="padded": draw as transformers' hook does, padding included.
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
        generator=None,
    ):
        _check_alpha(noise_alpha)
        _check_choice("distribution", distribution, DISTRIBUTIONS)
        _check_choice("length", length, LENGTHS)
        _check_choice("where", where, WHERE)
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed must be an integer, not {seed!r}")
        if generator is not None and (length, distribution, where) != ("padded", "uniform", "all"):
            raise ValueError(
                "generator= imitates transformers' hook and needs length='padded',"
                " distribution='uniform', where='all'"
            )
        self.noise_alpha, self.distribution = float(noise_alpha), distribution
        self.length, self.where, self.seed, self.generator = length, where, int(seed), generator
        if rank is None:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if ready else 0
        self.rank = rank
        self.from_callback = False
        self._handles, self._frames, self._embedding, self._model = [], [], None, None
        self._labels, self._step, self._step_is_set, self._sequences = None, 0, False, 0
        self._calls, self._calls_in_forward, self._sums = 0, 0, None

    # -- life ---------------------------------------------------------------------------

    @property
    def attached(self):
        return self._embedding is not None

    def attach(self, model):
        """Put the noise on `model.get_input_embeddings()`; returns self.

        Raises RuntimeError when noise is there already, ours or transformers' own.
        """
        embedding = model.get_input_embeddings()
        if embedding is None:
            raise ValueError(
                f"{type(model).__name__} has no input embedding module to add noise to"
            )
        other = _ACTIVE.get(embedding)
        if other is not None and other.from_callback:
            other.remove()  # left behind by a train() that raised: a callback cannot see that
        elif other is not None or self.attached:
            raise RuntimeError("embedding noise is attached already: remove() it first")
        hooks = embedding._forward_hooks.values()
        if hasattr(embedding, "neftune_noise_alpha") or any(
            getattr(h, "__name__", "") == "neftune_post_forward_hook" for h in hooks
        ):
            raise RuntimeError(
                "transformers' own NEFTune hook is on this model: unset neftune_noise_alpha,"
                " or the noise would be added twice"
            )
        names = [n for n, m in model.named_modules(remove_duplicate=False) if m is embedding]
        if not names:
            raise ValueError("get_input_embeddings() returned a module outside the model")
        for module in _enclosing(model, names[0]):
            self._handles += [
                module.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
                module.register_forward_hook(_Hook(self._leave), always_call=True),
            ]
        self._handles.append(
            embedding.register_forward_hook(_Hook(self._add_noise), with_kwargs=True)
        )
        self._embedding, self._model = embedding, weakref.ref(model)
        _ACTIVE[embedding] = self
        _forget_compiled(model)
        return self

    def remove(self):
        """Take the noise off again; harmless when it is off."""
        for handle in self._handles:
            handle.remove()
        if self._embedding is not None:
            _ACTIVE.pop(self._embedding, None)
            model = self._model()
            if model is not None:
                _forget_compiled(model)
        self._handles, self._frames, self._embedding = [], [], None

    def set_step(self, step):
        """Say which optimiser step the following forwards belong to; sequence numbers restart."""
        if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0:
            raise ValueError(f"step must be an integer >= 0, not {step!r}")
        self._step, self._step_is_set, self._sequences = int(step), True, 0

    def set_labels(self, labels):
        """Labels (batch, tokens) of the next forward, where that forward is not given them."""
        self._labels = labels

    # -- the forward ----------------------------------------------------------------------

    def _enter(self, module, args, kwargs):
        depth = next((i for i, (m, _) in enumerate(self._frames) if m is module), None)
        if depth is not None:  # an earlier forward was cut without running its exit hook
            del self._frames[depth:]
        if not self._frames:
            self._calls_in_forward = 0
        names = inspect.signature(module.forward).parameters
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        nested = given.get("kwargs") if isinstance(given.get("kwargs"), dict) else {}
        given = {**nested, **given}
        self._frames.append((module, {n: given[n] for n in _CONTEXT if given.get(n) is not None}))

    def _leave(self, module, args, output):
        context = {}
        while self._frames:
            inner, context = self._frames.pop()
            if inner is module:
                break
        if self._frames:
            return
        self._labels = None
        noisy = module.training and torch.is_grad_enabled() and output is not None
        if noisy and self._calls_in_forward == 0 and "inputs_embeds" in context:
            raise RuntimeError(
                "inputs_embeds was given, so no embedding was looked up and no noise added:"
                " pass input_ids, or add the noise to inputs_embeds yourself"
            )
        if self._calls_in_forward and not self._step_is_set:
            self._step, self._sequences = self._step + 1, 0
        self._calls_in_forward = 0

    def _context(self, shape):
        """Mask, positions and labels from the nearest enclosing module that has them."""
        found = {"labels": self._labels} if self._labels is not None else {}
        for _, given in reversed(self._frames):
            for name, value in given.items():
                found.setdefault(name, value)
        return found

    def _add_noise(self, module, args, kwargs, output):
        if not (module.training and torch.is_grad_enabled()):
            return None
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "the embedding was called again during backward: checkpoint the decoder layers"
                " (model.gradient_checkpointing_enable()), not the embedding, or noise would"
                " be drawn twice"
            )
        if not self._frames:
            raise RuntimeError(
                "the embedding was called outside the model's forward, so sequence lengths are"
                " unknown: call the model, or use torch.no_grad() to only look embeddings up"
            )
        ids = args[0] if args else kwargs.get("input")
        if output.dim() != 3 or ids.dim() != 2:
            return None  # a helper look-up of single ids, as some vision models do
        self._calls += 1
        self._calls_in_forward += 1
        if self.noise_alpha == 0:
            return None
        return output + self._draw(ids.shape, output.detach())

    def _draw(self, shape, clean):
        (batch, width), hidden = shape, clean.size(-1)
        context = self._context(shape)
        real, k, t, own, first, padding_free = _layout(shape, clean.device, context)
        k = k + self._sequences
        self._sequences = self._sequences + first.sum()
        if self.length == "sequence":
            length = own
        elif self.length == "packed":
            length = real.view(batch, width).sum(1, keepdim=True).expand(batch, width).flatten()
            length = length.clamp(min=1)
        else:
            length = (
                (own * real).max().expand(own.shape)
                if padding_free
                else torch.full_like(own, width)
            )
        noised = real & self._chosen(shape, context, clean.device)
        bound = _scale(length, hidden, self.noise_alpha) * noised
        flat = clean.reshape(-1, hidden)
        if self.generator is not None:
            edge = float(self.noise_alpha / torch.sqrt(torch.tensor(width * hidden)))
            noise = torch.empty_like(clean).uniform_(-edge, edge, generator=self.generator)
            squares = (noise.view(-1, hidden).float().square().sum(1) * noised).sum()
        else:
            noise, squares = torch.empty_like(clean), 0.0
            rows = max(1, _CHUNK // hidden)
            keys = _token_keys(_step_key(self.seed, self.rank, self._step), k, t)
            for i in range(0, len(keys), rows):
                part = _unit_noise(keys[i : i + rows], hidden, self.distribution)
                part *= bound[i : i + rows, None]
                squares = squares + part.square().sum()
                noise.view(-1, hidden)[i : i + rows] = part
        ratio = (own / length).sqrt().clamp(max=1) * _RATIO_BINS
        seen = torch.zeros(_RATIO_BINS + 1, device=clean.device)
        seen.scatter_add_(0, ratio.round().long(), (first & real).float())
        rms_clean = (flat.float().square().sum(1) * noised).sum()
        sums = torch.stack([noised.sum(), squares, bound.square().sum() * hidden / 3, rms_clean])
        sums = torch.cat([sums, seen]).to(torch.float64 if clean.device.type != "mps" else None)
        self._sums = sums if self._sums is None else self._sums + sums
        self._hidden = hidden
        return noise

    def _chosen(self, shape, context, device):
        if self.where == "all":
            return torch.ones(shape[0] * shape[1], dtype=torch.bool, device=device)
        labels = context.get("labels")
        if labels is None:
            raise RuntimeError(
                f"where='{self.where}' needs labels: pass labels= to the forward or call"
                " set_labels(labels) before it"
            )
        if labels.shape != torch.Size(shape):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, token ids {tuple(shape)}")
        response = (labels != -100).flatten().to(device)
        return response if self.where == "response" else ~response

    def report(self):
        """What was really added, as plain numbers (this is where the device is waited for).

        calls, tokens (noised ones), noise_rms and expected_rms (per embedding cell),
        relative_rms (noise over the clean embedding of the same tokens) and the quantiles
        effective_alpha_p10/p50/p90 over sequences, effective α = bound·√(L_i·d).
        """
        names = ("noise_rms", "expected_rms", "relative_rms")
        alphas = ("effective_alpha_p10", "effective_alpha_p50", "effective_alpha_p90")
        out = {"noise_alpha": self.noise_alpha, "calls": self._calls, "tokens": 0}
        if self._sums is None:
            return out | dict.fromkeys(names + alphas)
        tokens, noise, expected, clean, *seen = self._sums.tolist()
        cells = max(tokens * self._hidden, 1)
        out["tokens"] = int(tokens)
        out["noise_rms"] = math.sqrt(noise / cells)
        out["expected_rms"] = math.sqrt(expected / cells)
        out["relative_rms"] = math.sqrt(noise / clean) if clean else None
        seen = torch.tensor(seen).cumsum(0)
        for name, quantile in zip(alphas, (0.1, 0.5, 0.9), strict=True):
            position = int(torch.searchsorted(seen, quantile * float(seen[-1])))
            out[name] = self.noise_alpha * min(position, _RATIO_BINS) / _RATIO_BINS
        return out


def _enclosing(model, name):
    """The modules around the one called `name`, outermost first."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def _forget_compiled(model):
    """Compiled code does not notice new hooks: drop it, so that the change takes effect."""
    if any(
        getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()
    ):
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
    finally:
        noise.remove()


class NEFTuneCallback(TrainerCallback):
    """The noise as a callback of transformers' `Trainer` and of TRL's `SFTTrainer`.

    Same keywords as `noisy_embeddings`; seed None takes the trainer's. The step is the
    trainer's global step, so that a resumed run continues with the draws it would have had.
    `report()` and `remove()` are those of `EmbeddingNoise`. A callback is not told of an
    exception in train(): whatever it leaves behind, the next attachment clears.
    """

    def __init__(self, noise_alpha=5.0, *, seed=None, **options):
        self._arguments = {"noise_alpha": noise_alpha, **options}
        self._seed = seed
        self.noise = EmbeddingNoise(seed=0 if seed is None else seed, **self._arguments)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if getattr(args, "neftune_noise_alpha", None) is not None:
            raise RuntimeError("unset neftune_noise_alpha: NEFTuneCallback adds the noise already")
        self.noise.remove()
        seed = args.seed if self._seed is None else self._seed
        self.noise = EmbeddingNoise(seed=seed, **self._arguments)
        self.noise.attach(model)
        self.noise.from_callback = True

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.noise.attached:
            raise RuntimeError("the embedding noise was removed during training")
        self.noise.set_step(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.noise._calls == 0:
            raise RuntimeError(
                "no noise was added in the first optimiser step: the model was not called in"
                " training mode with input_ids"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.noise.remove()

    def report(self):
        return self.noise.report()

    def remove(self):
        self.noise.remove()
