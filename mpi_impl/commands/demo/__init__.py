"""Search a long video for small patches: what ``python -m lvxattn.mpi_impl demo`` does.

===============  =================================================================================
`search`         the program, top-down: read, search, judge, report, draw
`sources`        what is searched: the default video (`camera`), a file or a folder (`files`)
`descriptors`    patches of frames, what they look like (keys) and where they are (values)
`queries`        noisy copies of patches that other ranks hold
`judge`          is what came out right?
`report`         the text
`gallery`        what the picture shows
`draw`           the picture
===============  =================================================================================
"""

from lvxattn.mpi_impl.commands.demo.search import InputError, search_video

__all__ = ["InputError", "search_video"]
