import math
def wilson(wins, n):
    z=1.959963984540054; p=wins/n; d=1+z*z/n; c=(p+z*z/2/n)/d; h=z*math.sqrt(p*(1-p)/n+z*z/4/n/n)/d
    return {"mean":p,"low":max(0.0,c-h),"high":min(1.0,c+h),"n":n}
