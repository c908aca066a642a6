"""A recurrent policy trained by PPO on episodes that end anywhere in a rollout: the loop over steps, and one call.

    python examples/rollouts.py                            # about 15 s on two CPU cores

The task needs memory: a sign is shown in an episode's first step alone, and rewarded is the action that matches it.
Collecting is the same for both: step by step, the state set to zero where an episode has ended. Learning reads whole
rollouts. nn.LSTM has to go step by step again, because an episode may end in any row at any step:

    for t in range(T):
        alive = (~reset[t]).float()[:, None]
        y[t], (h, c) = lstm(x[t : t + 1], (h * alive, c * alive))

fused_lstm takes the ends with the sequence:

    y, hidden = lstm(x, hx, reset=reset)
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

import fused_lstm

State = tuple[Tensor, Tensor]


class Recall:
    """B environments; an observation is (sign in the first step, 1 in the first step, reward before)."""

    def __init__(self, B: int, generator: torch.Generator) -> None:
        self.B, self.generator = B, generator
        self.begins, self.sign = torch.ones(B, dtype=torch.bool), torch.zeros(B)
        self.reward = torch.zeros(B)

    def observe(self) -> tuple[Tensor, Tensor]:
        """The observation (B, 3), and where an episode begins with it (B,)."""
        new = torch.randint(0, 2, (self.B,), generator=self.generator) * 2.0 - 1
        self.sign = torch.where(self.begins, new, self.sign)
        first = self.begins.float()
        return torch.stack([self.sign * first, first, self.reward], 1), self.begins

    def act(self, action: Tensor) -> Tensor:
        """The reward of actions 0 or 1; an episode goes on with probability 0.9."""
        self.reward = ((action * 2 - 1) == self.sign).float()
        self.begins = torch.rand(self.B, generator=self.generator) < 0.1
        return self.reward


class Policy(nn.Module):
    def __init__(self, lstm: nn.Module, H: int) -> None:
        super().__init__()
        self.lstm, self.action, self.value = lstm, nn.Linear(H, 2), nn.Linear(H, 1)

    def forward(self, x: Tensor, hx: State, reset: Tensor) -> tuple[torch.distributions.Categorical, Tensor, State]:
        """Over x (T, B, 3): the actions' distribution, the values (T, B) and the state."""
        y, hx = self.unroll(x, hx, reset)
        return torch.distributions.Categorical(logits=self.action(y)), self.value(y)[..., 0], hx

    def unroll(self, x: Tensor, hx: State, reset: Tensor) -> tuple[Tensor, State]:
        if isinstance(self.lstm, fused_lstm.LSTM):
            return self.lstm(x, hx, reset=reset)
        (h, c), y = hx, []
        for t in range(len(x)):
            alive = (~reset[t]).float()[:, None]
            y_t, (h, c) = self.lstm(x[t : t + 1], (h * alive, c * alive))
            y.append(y_t)
        return torch.cat(y), (h, c)


def advantages(reward: Tensor, value: Tensor, ends: Tensor, gamma: float = 0.9, lam: float = 0.9) -> Tensor:
    """Generalized advantage estimates (T, B); ends: where an episode's last step is."""
    result, following = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        alive = (~ends[t]).float()
        after = value[t + 1] if t + 1 < len(reward) else torch.zeros_like(value[0])
        following = reward[t] + gamma * after * alive - value[t] + gamma * lam * alive * following
        result[t] = following
    return result


def train(lstm: nn.Module, args: argparse.Namespace) -> tuple[list[float], list[float], float]:
    """Returns the loss and the mean reward of every update, and the seconds that learning took."""
    torch.manual_seed(0)
    policy = Policy(lstm, args.hidden)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    environment = Recall(args.envs, torch.Generator().manual_seed(1))
    hx = torch.zeros(1, args.envs, args.hidden), torch.zeros(1, args.envs, args.hidden)
    losses, rewards, seconds = [], [], 0.0
    for _ in range(args.updates):
        start, steps = hx, []
        with torch.no_grad():
            for _ in range(args.steps):
                x, reset = environment.observe()
                distribution, value, hx = policy(x[None], hx, reset[None])
                action = torch.multinomial(distribution.probs[0], 1, generator=environment.generator)[:, 0]
                reward = environment.act(action)
                steps.append(
                    (x, reset, action, distribution.log_prob(action[None])[0], value[0], reward, environment.begins)
                )
        x, reset, action, log_prob, value, reward, ends = (torch.stack(column) for column in zip(*steps, strict=True))
        advantage = advantages(reward, value, ends)
        begin = time.perf_counter()
        normal = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        for _ in range(4):
            distribution, new_value, _ = policy(x, start, reset)
            ratio = (distribution.log_prob(action) - log_prob).exp()
            gain = torch.min(ratio * normal, ratio.clamp(0.8, 1.2) * normal).mean()
            loss = (new_value - advantage - value).square().mean() / 2 - gain - 0.01 * distribution.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - begin
        losses.append(loss.item())
        rewards.append(reward.mean().item())
    return losses, rewards, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()

    def make(cls: type) -> nn.Module:
        torch.manual_seed(0)
        return cls(3, args.hidden)

    theirs = train(make(nn.LSTM), args)
    ours = train(make(fused_lstm.LSTM), args)
    for name, (losses, rewards, seconds) in {"nn.LSTM": theirs, "fused_lstm": ours}.items():
        print(
            f"{name:>10}: loss {losses[-1]:.4f}, reward {rewards[0]:.2f} to {rewards[-1]:.2f}, learning {seconds:.1f} s"
        )
    # The first update starts from equal weights; after many, roundings may have led to another action.
    difference = abs(theirs[0][0] - ours[0][0])
    agree = difference < 1e-4
    print(f"{'AGREE' if agree else 'DISAGREE'}: the first losses differ by {difference:.1e}")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
