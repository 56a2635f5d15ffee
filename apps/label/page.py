"""The rating page as a Gradio app. Gradio draws the frame; the pane inside it talks to the routes of ``api``."""

from __future__ import annotations

import os

# Read when gradio is imported: no telemetry.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI


def mount(app: FastAPI) -> FastAPI:
    """The app with the page at ``/rate``."""
    with gr.Blocks(analytics_enabled=False, title="diffalign") as page:
        gr.HTML('<div id="pane"></div>')
    return gr.mount_gradio_app(
        app,
        page,
        path="/rate",
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        head='<link rel="stylesheet" href="/static/label.css"><script src="/static/label.js" defer></script>',
        auth_dependency=lambda request: request.state.user,
    )
