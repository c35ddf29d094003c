"""Vision transformer: an image, a spatial map or a sequence to one latent token per patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biojepa.model.blocks import (
    TransformerBlock,
    evaluation,
    position_embedding,
    require_dtype,
    require_shape,
)

MASKINGS = ("drop", "token")


class ViTEncoder(nn.Module):
    """Encode images patch by patch (Dosovitskiy et al., ICLR 2021); (B, C, H, W) → (B, T, D).

    A strided convolution embeds the patches, a learned position embedding is added, and ``depth``
    pre-norm blocks and a LayerNorm follow. There is no class token: pool the tokens.

    Patches are numbered row by row. Spatial data with any number of channels are images. So are
    sequences: F frames of P values are an image (1, F, P) with patches (1, P), and F frames of H × W
    pixels, stacked into (C, F·H, W), give the tokens frame by frame.

    Parameters
    ----------
    image_size, patch_size
        Height and width in pixels, or one number for both. The patches must tile the image.
    channels
        C.
    embed_dim
        D.
    depth, heads, mlp_ratio, dropout
        Of the transformer.
    masking
        What becomes of hidden patches: ``drop`` encodes the visible ones alone (I-JEPA, Assran et al.,
        CVPR 2023), ``token`` puts a learned token in the place of a hidden patch.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        masking: str = "drop",
    ) -> None:
        super().__init__()
        image, patch = _pair(image_size), _pair(patch_size)
        if image[0] % patch[0] or image[1] % patch[1]:
            raise ValueError(f"patches of {patch} pixels do not tile an image of {image}")
        if masking not in MASKINGS:
            raise ValueError(f"masking is {masking!r}; expected one of {', '.join(MASKINGS)}")
        self.image_size, self.patch_size, self.channels = image, patch, channels
        self.grid = (image[0] // patch[0], image[1] // patch[1])
        self.num_tokens, self.embed_dim, self.masking = self.grid[0] * self.grid[1], embed_dim, masking
        self.patches = nn.Conv2d(channels, embed_dim, patch, stride=patch)
        self.position = position_embedding(self.num_tokens, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(embed_dim)) if masking == "token" else None
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, heads, mlp_ratio, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encode images.

        Parameters
        ----------
        x
            (B, C, H, W).
        visible
            (T,) bool for all images, or (B, T) for each, True where a patch is shown; all are when it is
            not given. With ``masking="drop"`` every image must show as many.

        Returns
        -------
        (B, T, D); with ``masking="drop"`` (B, visible patches, D), in the order of the patches.

        Raises
        ------
        ValueError
            When a shape or dtype is another one, or images show different numbers of patches.
        """
        require_shape("x", x, (None, self.channels, *self.image_size))
        require_dtype("x", x, self.position.dtype)
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if visible is not None:
            require_shape("visible", visible, (*((len(x),) if visible.ndim > 1 else ()), self.num_tokens))
            require_dtype("visible", visible, torch.bool)
        if self.mask_token is not None and visible is not None:
            tokens = torch.where(visible[..., None], tokens, self.mask_token.to(tokens.dtype))
        tokens = tokens + self.position
        if self.mask_token is None and visible is not None:
            tokens = _keep(tokens, visible)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Encode whole images without gradient and without dropout, (B, T, D)."""
        with evaluation(self):
            return self(x)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _keep(tokens: Tensor, visible: Tensor) -> Tensor:
    """Select the visible tokens of (B, T, D)."""
    if visible.ndim == 1:
        return tokens[:, visible]
    shown = visible.sum(dim=1)
    if int(shown.min()) != int(shown.max()):
        raise ValueError(
            f"the images show {int(shown.min())} to {int(shown.max())} patches; expected as many each"
        )
    return tokens[visible].view(len(tokens), int(shown[0]), tokens.shape[2])
