document.title = "diffalign";
