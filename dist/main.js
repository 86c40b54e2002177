'use strict';

require('./launcher.js').launch('setup');
