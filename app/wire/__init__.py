"""What travels between the server and the sites, and how; both sides import it. No torch."""
