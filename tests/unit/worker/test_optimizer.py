"""The inner optimizers."""

import copy

import torch
from torch import nn

from trainer.config import TrainingConfig
from trainer.worker.optimizer import MuonWithAdamW, hidden_matrices, inner_optimizer


class Model(nn.Module):
    """Embedding, a hidden layer with a bias, and an output layer that is tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.out = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 11)
        self.back = nn.Linear(16, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.hidden(self.embedding(tokens)))
        return self.out(hidden) + self.out(torch.tanh(self.hidden(self.back(hidden))))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return inner_optimizer(TrainingConfig(inner_optimizer="muon", lr=1e-2), model)


def test_muon_is_for_hidden_matrices_alone() -> None:
    model = Model()
    assert [id(parameter) for parameter in hidden_matrices(model)] == [id(model.hidden.weight), id(model.back.weight)]
    optimizer = muon(model)
    step(model, optimizer, 0)
    state = {name: set(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    assert state["hidden.weight"] == {"momentum_buffer"}
    assert state["embedding.weight"] == state["hidden.bias"] == {"step", "exp_avg", "exp_avg_sq"}


def test_each_part_does_what_torchs_own_does() -> None:
    model, theirs = Model(), Model()
    optimizer = muon(model)
    hidden = hidden_matrices(theirs)
    rest = [parameter for parameter in theirs.parameters() if all(parameter is not other for other in hidden)]
    parts = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in rest if p.ndim > 1], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW([p for p in rest if p.ndim < 2], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for seed in range(5):
        step(model, optimizer, seed)
        tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
        nn.functional.cross_entropy(theirs(tokens).flatten(0, 1), tokens.flatten()).backward()
        for part in parts:
            part.step()
        for part in parts:
            part.zero_grad()
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_it_goes_on_from_its_state_and_follows_the_learning_rate() -> None:
    model = Model()
    optimizer = muon(model)
    for seed in range(3):
        step(model, optimizer, seed)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    losses = [step(model, optimizer, seed) for seed in range(3, 6)]
    again = Model()
    again.load_state_dict(weights)
    resumed = muon(again)
    resumed.load_state_dict(saved)
    assert [step(again, resumed, seed) for seed in range(3, 6)] == losses
    for group in resumed.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(again.state_dict())
    step(again, resumed, 7)
    assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())


def test_a_model_without_hidden_matrices_has_adamw_alone() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizer = inner_optimizer(TrainingConfig(inner_optimizer="muon"), model)
    assert isinstance(optimizer, MuonWithAdamW)
    assert len(optimizer.param_groups) == 1
