def table(r): return []
def page(r): return ""
