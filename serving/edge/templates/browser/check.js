// Says in one line why this page cannot work here. No module: a browser loads none from a file.
(function () {
  // A function that returns a v128 constant: valid only where WebAssembly has SIMD.
  var simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  var trouble = "";
  if (location.protocol === "file:") {
    trouble = "This page cannot be opened as a file. In its folder run: python -m http.server, then open http://127.0.0.1:8000";
  } else if (typeof WebAssembly !== "object" || !WebAssembly.validate(new Uint8Array(simd))) {
    trouble = "This browser has no WebAssembly SIMD, which the model needs. Chrome 91, Firefox 89, Safari 16.4 and newer have it.";
  }
  window.showTrouble = function (text) {
    var line = document.getElementById("trouble");
    line.textContent = text;
    line.hidden = false;
    document.getElementById("loading").hidden = true;
    document.getElementById("facts").textContent = "";
  };
  window.cannotRun = trouble !== "";
  if (trouble) window.showTrouble(trouble);
})();
