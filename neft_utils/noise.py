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
import sys
import warnings

import torch
from transformers import TrainerCallback

DISTRIBUTIONS = ("uniform", "gaussian", "rademacher")
LENGTHS = ("sequence", "padded", "packed")
WHERE = ("all", "prompt", "response")
_LAYOUT = ("attention_mask", "position_ids", "cu_seq_lens_q")
_CONTEXT = (*_LAYOUT, "labels", "inputs_embeds", "token_type_ids")
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


def _step_key(seed, rank, step):
    key = torch.zeros(1, dtype=torch.int64, device="cpu")
    for word in (seed, rank, step):
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


def _layout(shape, device, context):
    """Find real tokens, sequences and positions of a (batch, width) grid of token ids.

    Returns flat tensors of batch·width cells: real (bool), k (sequence number, empty ones
    not counted), t (position among the real tokens), length (L of the token's sequence) and
    first (bool, true at each sequence's first token). What the cells hold is decided on the
    device, sizes depend on batch·width alone, so nothing here waits for the device.
    """
    batch, width = shape
    cells = batch * width
    mask, positions, cu = (context.get(name) for name in _LAYOUT)
    cell = torch.arange(cells, device=device)
    real = torch.ones(cells, dtype=torch.bool, device=device)
    if mask is not None:
        if mask.dim() != 2 or len(mask) not in (1, batch) or mask.size(1) < width:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, token ids {(batch, width)}: the"
                " noise needs the (batch, tokens) mask of real tokens, not an expanded one"
            )
        # A mask wider than the ids covers a cache or a prefix first.
        mask = mask[:, mask.size(1) - width :]
        real = mask.to(device).bool().expand(batch, width).reshape(-1)
    count = real.cumsum(0)  # 1-based among all real tokens
    # The cell of the real token before this one, -1 if there is none.
    at = torch.full((cells + 2,), -1, device=device)
    previous = at.scatter_(0, torch.where(real, count, cells + 1), cell)[(count - 1).clamp(min=0)]
    first = (previous < 0) | (previous // max(width, 1) != cell // max(width, 1))
    if cu is not None:
        if batch > 1 and mask is not None:
            raise ValueError("cu_seq_lens_q with an attention_mask needs a batch of one row")
        edge = torch.zeros(cells + 1, dtype=torch.bool, device=device)
        edge.index_fill_(0, cu.to(device).long().clamp(max=cells), True)
        # Sequence number by cell, so that an edge on a padding cell counts as well.
        segment = edge[:-1].cumsum(0)
        first |= segment[previous] != segment
    elif positions is not None and positions.dim() < 3 and positions.size(-1) == width:
        position = positions.to(device).expand(batch, width).reshape(-1)
        # Goes on by one, or by as many as masked cells lie between: else a new sequence.
        ahead = position - position[previous]
        first |= (ahead != 1) & (ahead != cell - previous)
    first &= real
    k = first.cumsum(0) - 1
    start = torch.zeros(cells + 1, dtype=torch.int64, device=device)  # the last one is a dump
    start.scatter_(0, torch.where(first, k, cells), count)
    length = torch.zeros(cells + 1, dtype=torch.int64, device=device)
    length.scatter_add_(0, torch.where(real, k, cells), real.long())
    k = k.clamp(min=0)
    return real, k, count - start[k], length[k].clamp(min=1), first


# --------------------------------------------------------------------------------- hooks


class _Hook:
    """One hook of `noise`, kept out of compiled graphs; in a deep copy or pickle, a no-op."""

    def __init__(self, noise=None, method=None):
        self.noise = noise
        self.run = noise and torch.compiler.disable(getattr(noise, method))

    def __call__(self, *args):
        return None if self.run is None else self.run(*args)

    def __reduce__(self):
        return _Hook, ()


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
        _check_integer("seed", seed)
        if rank is not None:
            _check_integer("rank", rank)
        if generator is not None and (length, distribution, where) != ("padded", "uniform", "all"):
            raise ValueError(
                "generator= imitates transformers' hook and needs length='padded',"
                " distribution='uniform', where='all'"
            )
        self.noise_alpha, self.distribution = float(noise_alpha), distribution
        self.length, self.where, self.seed, self.generator = length, where, int(seed), generator
        self.rank, self.from_callback = rank, False
        self._handles, self._frames, self._embedding = [], [], None
        self._labels, self._step, self._step_is_set, self._sequences = None, 0, False, 0
        self._calls, self._calls_in_forward, self._hidden, self._sums = 0, 0, None, None

    # -- life ---------------------------------------------------------------------------

    @property
    def attached(self):
        return self._embedding is not None

    def attach(self, model):
        """Put the noise on `model.get_input_embeddings()`; returns self.

        Raises RuntimeError when noise is there already, ours or transformers' own.
        """
        while not hasattr(model, "get_input_embeddings") and hasattr(model, "module"):
            model = model.module  # DistributedDataParallel
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is None:
            raise ValueError(
                f"{type(model).__name__} has no input embedding module to add noise to"
            )
        hooks = embedding._forward_hooks.values()
        other = next((h.noise for h in hooks if isinstance(h, _Hook) and h.noise), None)
        if other is not None and other.from_callback:
            other.remove()  # left behind by a train() that raised: a callback cannot see that
        elif other is not None or self.attached:
            raise RuntimeError("embedding noise is attached already: remove() it first")
        _refuse_second_noise(embedding)
        names = [n for n, m in model.named_modules(remove_duplicate=False) if m is embedding]
        if not names:
            raise ValueError("get_input_embeddings() returned a module outside the model")
        if self.rank is None:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            self.rank = torch.distributed.get_rank() if ready else 0
        for module in _enclosing(model, names[0]):
            self._handles += [
                module.register_forward_pre_hook(_Hook(self, "_enter"), with_kwargs=True),
                module.register_forward_hook(_Hook(self, "_leave"), always_call=True),
            ]
        self._handles.append(
            embedding.register_forward_hook(_Hook(self, "_add_noise"), with_kwargs=True)
        )
        self._embedding = embedding
        _forget_compiled()
        return self

    def remove(self):
        """Take the noise off again; harmless when it is off."""
        for handle in self._handles:
            handle.remove()
        if self.attached:
            _forget_compiled()
        self._handles, self._frames, self._embedding = [], [], None

    def set_step(self, step):
        """Say which optimiser step the following forwards belong to; sequence numbers restart."""
        _check_integer("step", step)
        if step < 0:
            raise ValueError(f"step must be >= 0, not {step!r}")
        self._step, self._step_is_set, self._sequences = int(step), True, 0

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
            self._calls_in_forward = 0
            if not self._step_is_set:
                self._sequences = 0
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
        if not (self._embedding.training and torch.is_grad_enabled()):
            return
        raise RuntimeError(
            "inputs_embeds was given, so no embedding was looked up and no noise added: pass"
            " input_ids, or add the noise to inputs_embeds yourself"
            if "inputs_embeds" in given
            else "this forward did not call the embedding that the noise is on, so none was added:"
            " attach after the last change of the model (resize_token_embeddings, get_peft_model)"
        )

    def _context(self):
        """Mask, positions and labels from the nearest enclosing module that has them."""
        found = {"labels": self._labels} if self._labels is not None else {}
        for _, given in reversed(self._frames):
            found = {**given, **found}
        return found

    def _add_noise(self, module, args, kwargs, output):
        if not (module.training and torch.is_grad_enabled()):
            return None
        _refuse_second_noise(module)
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
        context = self._context()
        types = context.get("token_type_ids")
        if types is not None and types.data_ptr() == ids.data_ptr():
            return None  # GPT-2 looks its token types up in the token embedding
        self._calls += 1
        self._calls_in_forward += 1
        if self.noise_alpha == 0:
            return None
        return output + self._draw(ids.shape, output.detach(), context)

    def _draw(self, shape, clean, context):
        (batch, width), hidden, device = shape, clean.size(-1), clean.device
        real, k, t, own, first = _layout(shape, device, context)
        k = k + self._sequences
        self._sequences = self._sequences + first.sum()
        if self.length == "sequence":
            length = own
        elif self.length == "packed":
            length = real.view(batch, width).sum(1, keepdim=True).clamp(min=1)
            length = length.expand(batch, width).reshape(-1)
        else:
            length = torch.full_like(own, width)
            if batch == 1 and self.generator is None:  # several sequences: a padding-free row
                length = torch.where(first.sum() > 1, (own * real).max(), length)
        noised = real & self._chosen(shape, context, device)
        bound = _scale(length, hidden, self.noise_alpha) * noised
        noise, flat = torch.empty_like(clean), clean.reshape(-1, hidden)
        if self.generator is not None:  # the bound rounded as there, so that bits agree
            edge = float(self.noise_alpha / torch.tensor(width * hidden, device="cpu").sqrt())
            noise.uniform_(-edge, edge, generator=self.generator)
        cells = noise.view(-1, hidden)
        keys = _token_keys(_step_key(self.seed, self.rank, self._step), k, t)
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
        seen = torch.tensor(seen, dtype=torch.float64, device="cpu").cumsum(0)
        for name, quantile in zip(alphas, (0.1, 0.5, 0.9), strict=True):
            position = int(torch.searchsorted(seen, quantile * float(seen[-1])))
            out[name] = self.noise_alpha * min(position, _RATIO_BINS) / _RATIO_BINS
        return out


def _enclosing(model, name):
    """The modules around the one called `name`, outermost first."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def _refuse_second_noise(embedding):
    """transformers sets this attribute on the embedding while its own hook is there."""
    if hasattr(embedding, "neftune_noise_alpha") or any(
        getattr(hook, "__name__", "") == "neftune_post_forward_hook"
        for hook in embedding._forward_hooks.values()
    ):
        raise RuntimeError(
            "transformers' own NEFTune hook is on this model: unset neftune_noise_alpha and load"
            " the model anew, or the noise would be added twice"
        )


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
        self.options = {"noise_alpha": noise_alpha, "seed": seed, **options}  # as given
        self._arguments = {"noise_alpha": noise_alpha, **options}
        self._seed = seed
        self._calls_before = 0
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
        self.noise.attach(model)
        self.noise.from_callback = True

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

    def on_train_end(self, args, state, control, **kwargs):
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
    Raises ValueError for no lengths, lengths below 1 or a share that is not positive.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.float64, device="cpu").flatten()
    if len(lengths) == 0 or not (lengths >= 1).all():
        raise ValueError("lengths must hold at least one sequence, each of at least 1 token")
    if not (share > 0 and math.isfinite(share)):
        raise ValueError(f"share must be finite and > 0, not {share!r}")
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None) or embedding.weight.size(0)
    ids = torch.arange(rows, device=embedding.weight.device)
    with torch.no_grad():
        norms = [embedding(part[None]).float().norm(dim=-1)[0] for part in ids.split(4096)]
    return share * float(torch.cat(norms).mean()) * math.sqrt(3 * float(lengths.quantile(0.5)))
