"""Ranks that hold the same tokens draw the same noise; ranks that hold pieces are refused."""

import pytest
import torch
import transformers
from test_noise import Toy, looked_up, ragged, tiny
from test_noise_trainers import be_rank, free_port
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from neft_utils.noise import EmbeddingNoise, noisy_embeddings


@pytest.fixture
def world():
    """Starts a process group of which only this process is there."""

    def start(rank, size):
        stop()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    def stop():
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    yield start
    stop()


def rank_within(mesh):
    model = Toy()
    model._device_mesh = mesh
    noise = EmbeddingNoise().attach(model)
    noise.remove()
    return noise.rank


@pytest.mark.parametrize("rank", range(4))
def test_the_rank_is_the_data_parallel_one(world, rank):
    world(rank, 4)
    plain = EmbeddingNoise().attach(Toy())
    assert plain.rank == rank
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert rank_within(mesh) == rank_within(mesh["tp"]) == rank // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    assert rank_within(mesh) == rank_within(mesh["tp"]) == rank % 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    assert rank_within(mesh) == rank
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("fsdp", "tp"))
    assert rank_within(mesh) == 0
    assert EmbeddingNoise(rank=7).attach(Toy()).rank == 7


def test_the_rank_is_asked_at_every_attachment(world):
    noise, model = EmbeddingNoise(), Toy()
    noise.attach(model).remove()
    assert noise.rank == 0
    world(1, 2)
    assert noise.attach(model).rank == 1


@pytest.mark.parametrize("name", ["cp", "sp"])
def test_context_and_sequence_parallel_meshes_are_refused(world, name):
    world(0, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", name))
    with pytest.raises(RuntimeError, match=f"(?s)mesh has the dimension {name}.*piece of every"):
        rank_within(mesh)


def test_a_mesh_of_accelerate_counts_as_well(world, monkeypatch):
    from accelerate.state import AcceleratorState

    world(3, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "tp"))
    monkeypatch.setitem(AcceleratorState._shared_state, "device_mesh", mesh)
    assert rank_within(None) == 1


def test_an_embedding_that_puts_out_a_piece_of_the_sequence_is_refused():
    model = Toy()
    model.embed.register_forward_hook(lambda module, args, output: output[:, :3])
    with noisy_embeddings(model), pytest.raises(RuntimeError, match="(?s)sharded.*whole sequences"):
        model(torch.ones(1, 6, dtype=torch.long))


def worker(rank, port, folder):
    be_rank(rank, port)
    torch.distributed.init_process_group("gloo")
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto")
    model.train()
    with noisy_embeddings(model, 5.0) as noise:
        noise.set_step(0)
        seen = looked_up(model, **ragged([5, 3]))
        noise.set_step(0)
        model(**ragged([5, 3])).logits.float().square().sum().backward()
        assert noise.rank == 0
    gradient = model.model.norm.weight.grad
    gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    torch.save({"seen": seen, "gradient": gradient}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_ranks_of_a_tensor_parallel_model_draw_the_same_noise(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    torch.multiprocessing.spawn(worker, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(first["seen"], second["seen"])
    assert torch.allclose(first["gradient"], second["gradient"], rtol=1e-5)
    alone = tiny()
    with noisy_embeddings(alone, 5.0) as noise:
        noise.set_step(0)
        assert torch.equal(looked_up(alone, **ragged([5, 3])), first["seen"])
