"""Pictures: decoding, resizing and augmentation without torchvision."""

import io
import math
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.manifest import Augmentation
from trainer.data.random_numbers import uniform

if TYPE_CHECKING:
    from PIL.Image import Image


_LONGEST_SIDE = 16  # times the shorter one; the rest is cut off before the picture is resized


def decode(content: bytes, size: int, channels: int) -> np.ndarray:
    """A picture file's pixels: uint8 (size, size, channels). Raises ValueError if the content is not a picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as picture:
            return pixels(picture, size, channels)
    except UnidentifiedImageError:
        raise ValueError("its format is unknown") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def pixels(picture: "Image", size: int, channels: int) -> np.ndarray:
    """A picture's pixels as a viewer shows it: uint8 (size, size, channels); 1 channel is grey, 3 are RGB.

    It is rotated according to its EXIF orientation, transparent parts become white, and 16 bits per pixel become 8.
    """
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    longest = _LONGEST_SIDE * min(picture.size)
    if max(picture.size) > longest:  # resizing all of it could exhaust memory
        picture = ImageOps.fit(picture, (min(picture.width, longest), min(picture.height, longest)))
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = _in_8_bits(picture)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    # Resize the shorter side (bicubic, antialiased), then crop the centre
    picture = picture.convert("L" if channels == 1 else "RGB")
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size))).reshape(size, size, channels)


def _in_8_bits(picture: "Image") -> "Image":
    """A grey picture with 8 bits per pixel instead of 16 (or floats), which Pillow would clip at 255."""
    from PIL import Image

    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    brightest = values.max(initial=0.0)
    white = 1.0 if picture.mode == "F" and brightest <= 1 else 255.0 if brightest <= 255 else 65535.0
    if picture.mode.startswith("I;16"):
        white = 65535.0
    return Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


def augment(images: np.ndarray, positions: np.ndarray, seed: int, how: Augmentation) -> np.ndarray:
    """Crop, resize back, rotate and mirror: Inception's random crops (arXiv 1409.4842, §6).

    The random numbers depend only on the seed and the picture's position in the data order, so the result is the same
    in a resumed run, in another worker and with another batch size.

    Args:
        images: uint8 (n, height, width, channels).
        positions: int64 (n,).

    Returns:
        uint8, of the same shape. Pixels from outside the picture repeat its border.
    """
    import torch
    import torch.nn.functional as F

    # Draw area, aspect ratio, position, angle and mirroring of each crop
    numbers = torch.from_numpy(uniform(positions, seed, 6))
    low, high = how.scale
    area = low + (high - low) * numbers[:, 0]
    shape = torch.exp(math.log(how.ratio[0]) + math.log(how.ratio[1] / how.ratio[0]) * numbers[:, 1])
    width, height = (area * shape).sqrt().clamp(max=1.0), (area / shape).sqrt().clamp(max=1.0)
    if high > 1:  # a crop larger than the picture shrinks it
        width, height = (area * shape).sqrt(), (area / shape).sqrt()
    x, y = (1 - width) * (2 * numbers[:, 2] - 1), (1 - height) * (2 * numbers[:, 3] - 1)
    angle = math.radians(how.rotation) * (2 * numbers[:, 4] - 1)
    mirror = torch.where((numbers[:, 5] < 0.5) & how.flip, -1.0, 1.0)
    # Resample each picture along the affine map from its new pixels to its old ones
    rows = (
        torch.stack([mirror * width * angle.cos(), -height * angle.sin(), x], dim=1),
        torch.stack([mirror * width * angle.sin(), height * angle.cos(), y], dim=1),
    )
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    grid = F.affine_grid(torch.stack(rows, dim=1).float(), list(pictures.shape), align_corners=False)
    varied = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return varied.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).numpy()
