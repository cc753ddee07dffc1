"""Five models that only seem robust, and honest ones, on digits."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from jemkit import PGD, Images
from jemkit.attacks.pixel_model import UNIT
from jemkit.models.networks import NetworkSpec, SmallCNN, seeded_init

RADIUS_PX = 25.5
CNN = SmallCNN()


class Net(nn.Module):
    """A network with a linear head, from [0, 1] images to ten logits."""

    def __init__(self, spec: NetworkSpec, rng: Generator) -> None:
        super().__init__()
        with seeded_init(rng):
            self.network = spec.build((1, 8, 8))
            self.head = nn.Linear(self.network.width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.network(2 * x - 1))
        return out


def trained(
    images: Images, seed: int, *, robust: bool, spec: NetworkSpec = CNN, epochs: int = 6
) -> nn.Module:
    """A classifier of digits, on clean images or on those of PGD-5 (Madry et al. 2018)."""
    rng = Generator().manual_seed(seed)
    model = Net(spec, rng)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    pixels = images.unit()
    for _ in range(epochs):
        for index in torch.randperm(len(pixels), generator=rng).split(64):
            x, y = pixels[index], images.y[index]
            if robust:

                def loss(z: Tensor, y: Tensor = y) -> Tensor:
                    return F.cross_entropy(model(z), y, reduction="none")

                x = PGD(steps=5).draw(model, loss, x, rng, bounds=UNIT, radius_px=RADIUS_PX)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def linear(images: Images, seed: int, epochs: int = 60) -> nn.Module:
    """Softmax regression."""
    rng = Generator().manual_seed(seed)
    with seeded_init(rng):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(images.unit()), images.y).backward()
        optimizer.step()
    return model


class Masked(nn.Module):
    """A classifier behind something that hides its gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Saturated(Masked):
    """Logits so large that the cross-entropy of a right answer is exactly 0."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e3 * self.inner(x)  # type: ignore[no-any-return]


class Noisy(Masked):
    """Another noise on the image at every pass."""

    def __init__(self, inner: nn.Module, seed: int = 0) -> None:
        super().__init__(inner)
        self.rng = Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.rng)
        return self.inner(x + 0.1 * noise)  # type: ignore[no-any-return]


class Quantised(Masked):
    """Pixels rounded to five levels."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((4 * x).round() / 4)  # type: ignore[no-any-return]


class Detached(Masked):
    """A preprocessing that is nearly the identity, outside the graph."""

    def forward(self, x: Tensor) -> Tensor:
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return self.inner((0.9 * x + 0.1 * blurred).detach())  # type: ignore[no-any-return]


def batch_normed(images: Images, seed: int) -> nn.Module:
    """Batch norm that goes by the batch whatever the mode."""
    model = trained(images, seed, robust=False, spec=SmallCNN(norm="batch"), epochs=3)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return model
