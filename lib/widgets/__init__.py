"""The prompt explorer: try words on an image and see the mask answer."""

from lib.widgets.explorer import PromptExplorer, explore

__all__ = ["PromptExplorer", "explore"]
