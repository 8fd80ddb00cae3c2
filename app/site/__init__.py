"""What runs at a site, in the ClientApp: the only room with torch. Nothing of ``app.server``."""
