"""``python -m lvxattn.mpi_impl demo``: search a long video for small patches.

===============  =================================================================================
`search`         the program, top-down: read, search, judge, report, draw
`sources`        the video: the default one, a file or a folder (`files` reads these)
`patches`        descriptors of patches (keys), their places (values), noisy copies (queries)
`answers`        which answers are right, and which the picture shows
`search_report`  the text
`draw`           the picture
===============  =================================================================================
"""

from lvxattn.mpi_impl.commands.demo.search import search_video

__all__ = ["search_video"]
