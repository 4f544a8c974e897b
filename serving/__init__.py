"""Parts that some workers share. An image holds those that its handler imports."""
