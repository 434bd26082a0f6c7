import ApertusCore
import ApertusMLX
import Foundation
import MLX
