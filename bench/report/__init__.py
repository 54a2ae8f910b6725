"""``python -m bench report``: what is kept in bench/results, as one page of HTML that fetches nothing."""
