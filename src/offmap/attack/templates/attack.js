"use strict"; // This page has no script.
