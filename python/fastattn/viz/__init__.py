"""Pictures of attention, as files and as a page to explore. They need ``pip install 'fastattn[viz]'``."""

from fastattn.viz._distance import distance
from fastattn.viz._heatmap import heatmap
from fastattn.viz._links import links
from fastattn.viz._mass import mass
from fastattn.viz._overlay import overlay
from fastattn.viz._page import page
from fastattn.viz._save import save
from fastattn.viz.recording import Layer, Recording, record

__all__ = ["Layer", "Recording", "distance", "heatmap", "links", "mass", "overlay", "page", "record", "save"]
