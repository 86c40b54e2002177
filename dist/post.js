'use strict';

require('./launcher.js').launch('report');
