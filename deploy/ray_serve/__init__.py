"""Serving on many machines with Ray Serve: front ends and engines as deployments of one application.

`serve run deploy.ray_serve:app model=...` and `serve deploy` find the application here.
"""

from deploy.ray_serve.application import app as app
