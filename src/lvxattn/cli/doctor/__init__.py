"""The command ``doctor`` of both implementations: check that a cluster is fit for a run.

==============  ==========================================================================
`examination`   the program, top-down: examine, find problems, print
`rank_info`     what a rank tells about its host, its software and its limits
`network`       interfaces, and connections that are tried before any collective
`links`         messages really sent, clocks compared, a file that all hosts should see
`problems`      what is wrong, and what to do; on one host: `hosts`
`report`        the report
==============  ==========================================================================
"""

from lvxattn.cli.doctor.examination import DoctorRanks, examine
from lvxattn.cli.doctor.rank_info import Environment, RankInfo, look_around

__all__ = ["DoctorRanks", "Environment", "RankInfo", "examine", "look_around"]
